"""Gradients between processes at low rank: the hook of DistributedDataParallel, and FSDP2."""

from .fsdp import attach_low_rank_reduce as attach_low_rank_reduce
from .fsdp_state import LowRankReduceState as LowRankReduceState
from .hook import low_rank_hook as low_rank_hook
from .powersgd import LowRankCommState as LowRankCommState
from .state_dict import merge_comm_states as merge_comm_states
