"""Low-rank gradients between replicas of an FSDP2 model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LowRankError
from ..rank import Budget, Rank
from .collectives import Mean
from .fsdp_private import Unit, check_version, units_of
from .fsdp_state import LowRankReduceState

WHO = "attach_low_rank_reduce"
REMEDY = (
    'mesh = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard")); '
    'fully_shard(model, mesh=mesh["shard"]); replicate_group=mesh["replicate"].get_group()'
)


def attach_low_rank_reduce(
    model: nn.Module,
    *,
    replicate_group: dist.ProcessGroup,
    rank: Rank | Budget = 4,
    start_step: int = 0,
    saving: float = 1.0,
    alternate: bool = False,
    refresh: int | None = None,
    local_iterations: int = 1,
    wire: torch.dtype | None = None,
    error_dtype: torch.dtype = torch.float32,
    error_feedback: bool = True,
    warm_start: bool = True,
    scaler: Any = None,
    timeout: timedelta | None = None,
    stream: torch.cuda.Stream | None = None,
) -> LowRankReduceState:
    """Hybrid sharding with low-rank gradients between replicas of a model that ``fully_shard`` has sharded.

    Within a replica FSDP2 gathers parameters and scatters gradients as it does; between replicas each process averages
    its own shards at low rank, as :class:`LowRankCommState` does, where FSDP2 would average them as they are. The mesh
    of ``fully_shard`` has one dimension: on one of two FSDP2 averages whole gradients first, and nothing is saved.
    Parameters and buffers become those of the first replica.

    All replicas have to use the same parameters in each backward, as with FSDP2 alone; where they do not,
    ``set_reduce_scatter_unused_params(True)`` makes them. Under ``set_requires_all_reduce(False)`` gradients are kept
    aside, and ``.grad`` is zero, until a backward that averages.

    Args:
        model: with ``fully_shard`` on it, and perhaps on parts of it.
        replicate_group: the processes that hold the same shards.
        rank: of the gradient of every shard, as for :class:`LowRankCommState`.
        start_step: averages whole gradients before.
        saving: a shard whose factors are not smaller by that factor is sent whole.
        alternate: sends one factor a step, in turn.
        refresh: steps after which directions are drawn anew; ``None`` never does.
        local_iterations: steps of subspace iteration that each process makes on its own shard first.
        wire: dtype on the wire; ``None`` is fp32 for factors and the reduction's own for the rest.
        error_dtype: what is left over is remembered in: fp32, bf16 or int8.
        error_feedback: adds what was left over to the next gradient.
        warm_start: goes on from the last directions.
        scaler: a ``GradScaler`` whose changes of scale the errors follow.
        timeout: of a collective.
        stream: on CUDA, to reduce in; ``None`` is FSDP2's own.

    Returns:
        The state, with ``stats()`` of this process' shards.

    Raises:
        LowRankError: for a model that is not sharded, or over a mesh of two dimensions; for a group that is not one of
            replicas, or whose processes have other models; for a torch whose FSDP2 is not known; for settings as in
            :class:`LowRankCommState`.

    Examples:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.fsdp import fully_shard
        >>> mesh = init_device_mesh("cuda", (2, 8), mesh_dim_names=("replicate", "shard"))  # doctest: +SKIP
        >>> for block in model.blocks:  # doctest: +SKIP
        ...     fully_shard(block, mesh=mesh["shard"])
        >>> fully_shard(model, mesh=mesh["shard"])  # doctest: +SKIP
        >>> group = mesh["replicate"].get_group()  # doctest: +SKIP
        >>> state = lr.attach_low_rank_reduce(model, replicate_group=group, rank=4)  # doctest: +SKIP
    """
    check_version()
    units = units_of(model)
    _check_sharding(model, units)
    settings = {
        "rank": rank,
        "start_step": start_step,
        "saving": saving,
        "alternate": alternate,
        "refresh": refresh,
        "local_iterations": local_iterations,
        "wire": wire,
        "error_dtype": error_dtype,
        "error_feedback": error_feedback,
        "warm_start": warm_start,
    }
    _check_group(units, replicate_group)
    _check_alike(units, replicate_group, settings)
    state = LowRankReduceState(
        units, model=model, process_group=replicate_group, scaler=scaler, timeout=timeout, **settings
    )
    for unit in units:
        for tensor in unit.parameters().values():
            _agree_(tensor, state.mean, unit.device)
    for buffer in model.buffers():
        _agree_(buffer, state.mean, units[0].device)
    for unit in units:
        unit.on_reduce(state.reduce_, stream)
    return state


def _check_sharding(model: nn.Module, units: Sequence[Unit]) -> None:
    if not units:
        raise LowRankError(
            f"{WHO}: got a {type(model).__name__} without shards; call fully_shard on it first. {REMEDY}"
        )
    if any(unit.replicated for unit in units):
        raise LowRankError(
            f"{WHO}: got a model on a mesh with replicas, expected one of shards alone: FSDP2 averages whole gradients "
            f"over that mesh before any hook, and nothing would be saved. {REMEDY}"
        )
    if any(unit.hooked for unit in units):
        raise LowRankError(f"{WHO}: got a model with an all-reduce hook, expected one without; attach once.")
    sharded = {name: tensor for unit in units for name, tensor in unit.parameters().items()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and name not in sharded]
    if outside:
        raise LowRankError(
            f"{WHO}: {outside[0]!r} is not sharded, and nothing would average its gradient; call fully_shard on the "
            "model too, after its parts, or freeze it."
        )
    for name, tensor in [*sharded.items(), *model.named_buffers()]:
        if tensor.is_meta:
            raise LowRankError(f"{WHO}: {name!r} is on the meta device; call to_empty and fill it first.")


def _check_group(units: Sequence[Unit], group: dist.ProcessGroup) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise LowRankError(
            f"{WHO}: got replicate_group {type(group).__name__}, expected a process group this process is in. {REMEDY}"
        )
    replicas, rank = dist.get_process_group_ranks(group), dist.get_rank()
    for unit in units:
        shards = dist.get_process_group_ranks(unit.shard_group)
        if set(replicas) & set(shards) != {rank}:
            raise LowRankError(
                f"{WHO}: got replicate_group of processes {replicas} and shards on {shards}, expected {rank} alone in "
                f"both: replicas are the processes that hold the same shards. {REMEDY}"
            )


def _check_alike(units: Sequence[Unit], group: dist.ProcessGroup, settings: dict[str, Any]) -> None:
    """By what every process of the group says of itself."""
    shown = {key: repr(value) if _says_all(value) else type(value).__name__ for key, value in settings.items()}
    mine = {
        "shards": [unit.shard_group.rank() for unit in units],
        "shapes of parameters": [shape for unit in units for shape in unit.shapes().items()],
        "settings": shown,
    }
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, mine, group=group)
    for other, rank in zip(said, dist.get_process_group_ranks(group), strict=True):
        for what, value in mine.items():
            if other[what] != value:
                raise LowRankError(
                    f"{WHO}: process {rank} of replicate_group has other {what} than process {dist.get_rank()}, "
                    f"expected the same ({other[what]} and {value}). {REMEDY}"
                )


def _says_all(value: object) -> bool:
    """Whether its text is the same in every process, and all there is to say."""
    return value is None or isinstance(value, int | float | torch.dtype) or is_dataclass(value)


def _agree_(tensor: Tensor, mean: Mean, device: torch.device) -> None:
    """What the first replica has; as bytes, since not every backend sends every dtype."""
    if tensor.numel():
        sent = tensor.detach().to(device).contiguous()
        mean.agree_(sent.view(-1).view(torch.uint8))
        with torch.no_grad():
            tensor.copy_(sent)
