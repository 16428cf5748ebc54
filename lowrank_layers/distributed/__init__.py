"""Gradients averaged between processes at low rank (PowerSGD), for DistributedDataParallel and FSDP2."""

from .comm_state import LowRankCommState as LowRankCommState
from .fsdp import attach_low_rank_reduce as attach_low_rank_reduce
from .fsdp_state import LowRankReduceState as LowRankReduceState
from .hook import low_rank_hook as low_rank_hook
from .settings import PowerSGDSettings as PowerSGDSettings
from .state_dict import merge_comm_states as merge_comm_states
