"""Gradients at low rank: between processes, and in the optimizer."""

from .hook import low_rank_hook
from .projection import LowRankProjection
from .state import LowRankCommState

__all__ = ["LowRankCommState", "LowRankProjection", "low_rank_hook"]
