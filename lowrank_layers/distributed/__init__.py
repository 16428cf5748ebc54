"""Gradients at low rank: between processes, and in the optimizer."""

from .checkpoint import merge_comm_states
from .hook import low_rank_hook
from .projection import LowRankProjection
from .state import LowRankCommState

__all__ = ["LowRankCommState", "LowRankProjection", "low_rank_hook", "merge_comm_states"]
