"""Tensors into factors."""

from .cp import cp
from .svd import svd
from .tucker import tucker

__all__ = ["cp", "svd", "tucker"]
