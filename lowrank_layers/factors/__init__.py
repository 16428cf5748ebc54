"""Factorizations as values: the factors of a tensor, their size, and how to multiply them out."""

from .base import Factorization
from .block_tt import BlockTT
from .blocks import Blocks
from .cp import CP
from .nmf import NMF
from .svd import SVD
from .tucker import Tucker

__all__ = ["CP", "NMF", "SVD", "BlockTT", "Blocks", "Factorization", "Tucker"]
