"""Key/value caches at low rank: the core in plain torch, and transformers' interface."""

from .allocate import compress_together
from .offline import kv_subspaces
from .plain import LowRankAttention
from .rotation import Rotation
from .settings import KVSettings
from .state import LowRankKV
from .subspace import Subspace

__all__ = [
    "KVSettings",
    "LowRankAttention",
    "LowRankKV",
    "Rotation",
    "Subspace",
    "compress_together",
    "kv_subspaces",
]
