"""Low-rank averaging of gradients between replicas of an FSDP2 model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LowRankError
from ..rank import Budget, Rank
from ..settings import settings_from
from .collectives import Collectives
from .fsdp_private import FSDPUnit, check_version, units_of
from .fsdp_state import LowRankReduceState
from .settings import PowerSGDSettings

WHO = "attach_low_rank_reduce"
REMEDY = (
    'mesh = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicate", "shard")); '
    'fully_shard(model, mesh=mesh["shard"]); replicate_group=mesh["replicate"].get_group()'
)


def attach_low_rank_reduce(
    model: nn.Module,
    settings: PowerSGDSettings | Rank | Budget | None = None,
    *,
    replicate_group: dist.ProcessGroup,
    scaler: Any = None,
    timeout: timedelta | None = None,
    stream: torch.cuda.Stream | None = None,
    **options: Any,
) -> LowRankReduceState:
    """Averages the gradients of an FSDP2 model between replicas at low rank (hybrid sharding, HSDP).

    Within a replica FSDP2 gathers parameters and reduce-scatters gradients as usual; between replicas each process
    averages its own shards at low rank, as :class:`LowRankCommState` does, where FSDP2 would average them uncompressed.
    The mesh given to ``fully_shard`` has one dimension: over a mesh of two dimensions FSDP2 averages whole gradients
    first, and nothing is saved. Parameters and buffers are overwritten with those of the first replica.

    All replicas have to use the same parameters in each backward, as with FSDP2 alone; if they do not, call
    ``set_reduce_scatter_unused_params(True)``. Under ``set_requires_all_reduce(False)`` gradients are accumulated, and
    ``.grad`` is zero, until a backward that averages.

    Args:
        model: a model to which, and perhaps to parts of which, ``fully_shard`` was applied.
        settings: the rank, or all options as :class:`PowerSGDSettings`; ``None`` is the default of each.
        replicate_group: the processes that hold the same shards.
        scaler: a ``GradScaler``, whose changes of scale the errors follow.
        timeout: time limit of a collective.
        stream: the CUDA stream to reduce in; ``None`` is that of FSDP2.
        **options: fields of :class:`PowerSGDSettings`, such as ``rank=4``; they replace those of ``settings``.

    Returns:
        The state, with ``stats()`` of the shards of this process.

    Raises:
        LowRankError: for a model that is not sharded, or sharded over a mesh of two dimensions; for a group that is not
            one of replicas, or whose processes have other models or options; for a version of torch whose FSDP2 is not
            known; for an option that does not exist or is out of range.

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
    chosen = settings_from(PowerSGDSettings, settings, options, WHO)
    check_version()
    units = units_of(model)
    _check_sharding(model, units)
    _check_group(units, replicate_group)
    _check_alike(units, replicate_group, chosen)
    state = LowRankReduceState(units, chosen, Collectives(replicate_group, None, timeout), model, scaler)
    for unit in units:
        for tensor in unit.parameters().values():
            _broadcast_(tensor, state.collectives, unit.device)
    for buffer in model.buffers():
        _broadcast_(buffer, state.collectives, units[0].device)
    for unit in units:
        unit.on_reduce(state.reduce_, stream)
    return state


def _check_sharding(model: nn.Module, units: Sequence[FSDPUnit]) -> None:
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


def _check_group(units: Sequence[FSDPUnit], group: dist.ProcessGroup) -> None:
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


def _check_alike(units: Sequence[FSDPUnit], group: dist.ProcessGroup, settings: PowerSGDSettings) -> None:
    """Raises unless all processes of the group have the same shards and settings."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    mine = {
        "shards": [unit.shard_group.rank() for unit in units],
        "shapes of parameters": [shape for unit in units for shape in unit.shapes().items()],
        "settings": {name: _comparable(value) for name, value in values.items()},
    }
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    for other, rank in zip(everyone, dist.get_process_group_ranks(group), strict=True):
        for what, value in mine.items():
            if other[what] != value:
                raise LowRankError(
                    f"{WHO}: process {rank} of replicate_group has other {what} than process {dist.get_rank()}, "
                    f"expected the same ({other[what]} and {value}). {REMEDY}"
                )


def _comparable(value: object) -> str:
    """A value's text where it is the same in every process, else the name of its type."""
    has_full_text = value is None or isinstance(value, int | float | torch.dtype) or is_dataclass(value)
    return repr(value) if has_full_text else type(value).__name__


def _broadcast_(tensor: Tensor, collectives: Collectives, device: torch.device) -> None:
    """Overwrites a tensor with that of the first replica; sent as bytes, since backends do not send every dtype."""
    if tensor.numel():
        sent = tensor.detach().to(device).contiguous()
        collectives.broadcast_(sent.view(-1).view(torch.uint8))
        with torch.no_grad():
            tensor.copy_(sent)
