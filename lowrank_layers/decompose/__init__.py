"""Decompositions: from a tensor to its factors."""

from .cp import cp as cp
from .nmf import nmf as nmf
from .svd import svd as svd
from .tucker import tucker as tucker
