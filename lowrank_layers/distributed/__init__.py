"""Gradients at low rank, between processes."""

from .hook import low_rank_hook
from .state import LowRankCommState

__all__ = ["LowRankCommState", "low_rank_hook"]
