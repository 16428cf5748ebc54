"""The communication hook. DDP reads its annotations as they are, so they are not strings here."""

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from ..errors import LowRankError
from .powersgd import LowRankCommState


def low_rank_hook(state: LowRankCommState, bucket: GradBucket) -> Future[torch.Tensor]:
    """Averages a bucket at low rank: ``ddp.register_comm_hook(lr.LowRankCommState(rank=4), lr.low_rank_hook)``.

    Args:
        state: see :class:`LowRankCommState`.
        bucket: of gradients, from DDP.
    """
    if not isinstance(state, LowRankCommState):
        raise LowRankError(f"low_rank_hook: got state {type(state).__name__}, expected a LowRankCommState.")
    return state.submit(bucket)
