"""Tensors into factors."""

from .cp import cp
from .nmf import nmf
from .svd import svd
from .tucker import tucker

__all__ = ["cp", "nmf", "svd", "tucker"]
