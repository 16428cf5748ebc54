"""Gradients between processes at low rank: the hook of DistributedDataParallel, and FSDP2."""

from .fsdp import attach_low_rank_reduce
from .fsdp_state import LowRankReduceState
from .hook import low_rank_hook
from .powersgd import LowRankCommState
from .state_dict import merge_comm_states

__all__ = [
    "LowRankCommState",
    "LowRankReduceState",
    "attach_low_rank_reduce",
    "low_rank_hook",
    "merge_comm_states",
]
