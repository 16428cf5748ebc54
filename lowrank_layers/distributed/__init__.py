"""Gradients at low rank: between processes, and in the optimizer."""

from .checkpoint import merge_comm_states
from .fsdp import attach_low_rank_reduce
from .fsdp_state import LowRankReduceState
from .hook import low_rank_hook
from .projection import LowRankProjection
from .state import LowRankCommState

__all__ = [
    "LowRankCommState",
    "LowRankProjection",
    "LowRankReduceState",
    "attach_low_rank_reduce",
    "low_rank_hook",
    "merge_comm_states",
]
