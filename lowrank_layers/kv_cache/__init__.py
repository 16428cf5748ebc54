"""Key/value caches at low rank: the core in plain torch, and transformers' interface."""

from .attend import attend
from .rotation import Rotation
from .settings import KVSettings
from .state import LowRankKV
from .subspace import Subspace

__all__ = ["KVSettings", "LowRankKV", "Rotation", "Subspace", "attend"]
