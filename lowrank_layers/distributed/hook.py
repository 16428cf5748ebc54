"""The communication hook of DistributedDataParallel."""

# DDP checks the hook's annotations as they are, so they must not become strings: no annotations from __future__ here
import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from ..errors import LowRankError
from .comm_state import LowRankCommState


def low_rank_hook(state: LowRankCommState, bucket: GradBucket) -> Future[torch.Tensor]:
    """Averages a bucket of gradients over processes at low rank (PowerSGD).

    A communication hook: ``ddp.register_comm_hook(lr.LowRankCommState(rank=4), lr.low_rank_hook)``.

    Args:
        state: the state, one per model and process.
        bucket: a bucket of gradients, from DDP.

    Raises:
        LowRankError: for another state.
    """
    if not isinstance(state, LowRankCommState):
        raise LowRankError(f"low_rank_hook: got state {type(state).__name__}, expected a LowRankCommState.")
    return state.submit(bucket)
