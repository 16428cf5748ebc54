"""What FSDP2 knows of its shards and does not tell: all that is read of torch's private side stands here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LowRankError

KNOWN = ((2, 11), (2, 13))
"""Versions of torch whose private side is as it is read here: the first and the last."""


def check_version() -> None:
    """Refuses a torch whose private side may be another."""
    numbers = torch.__version__.split(".")[:2]
    version = tuple(int(number) if number.isdigit() else -1 for number in numbers)
    if not KNOWN[0] <= version <= KNOWN[1]:
        first, last = (".".join(map(str, version)) for version in KNOWN)
        raise LowRankError(
            f"attach_low_rank_reduce: got torch {torch.__version__}, expected {first} to {last}: FSDP2 does not tell "
            "the shapes of shards, and where it keeps them is known for these. Install one of them, or shard over a "
            "2-d mesh (native HSDP, whole gradients)."
        )


class Unit:
    """The parameters that one ``fully_shard`` put together: FSDP2 reduces their gradients as one flat tensor.

    Args:
        module: that was given to ``fully_shard``.
        group: of its parameters.
        names: of the modules, in the whole model.
    """

    def __init__(self, module: nn.Module, group: Any, names: dict[int, str]) -> None:
        self.module, self._group = module, group
        self._present: list[Any] = []
        self._names = {id(shard): _name(shard, names) for shard in group.fsdp_params}

    @property
    def name(self) -> str:
        """That of its first parameter."""
        return next(iter(self._names.values()), "")

    @property
    def device(self) -> torch.device:
        """That gradients are on when they are reduced."""
        device: torch.device = self._group.device
        return device

    @property
    def replicated(self) -> bool:
        """Whether FSDP2 averages over replicas itself."""
        return self._group.mesh_info.replicate_mesh_dim is not None

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The processes that hold a model together."""
        group: dist.ProcessGroup = self._group.mesh_info.shard_process_group
        return group

    @property
    def hooked(self) -> bool:
        """Whether there is a hook already."""
        return self._group._all_reduce_hook is not None

    @property
    def all_reduces(self) -> bool:
        """What ``set_requires_all_reduce`` was given."""
        return bool(self._group.all_reduce_grads)

    def parameters(self) -> dict[str, Tensor]:
        """The shards of this process."""
        shards = {self._names[id(shard)]: shard.sharded_param for shard in self._group.fsdp_params}
        return {name: p.to_local().detach().requires_grad_(p.requires_grad) for name, p in shards.items()}

    def tags(self) -> dict[str, str]:
        """Names with the place of the shard: what is remembered of one is nothing to another."""
        place = self.shard_group.rank()
        return {name: f"{name}:shard{place}" for name in self._names.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of whole parameters."""
        return {self._names[id(shard)]: tuple(shard.sharded_param.shape) for shard in self._group.fsdp_params}

    def on_reduce(self, hook: Callable[[Unit, Tensor], None], stream: torch.cuda.Stream | None) -> None:
        """Calls ``hook(unit, flat)`` between reduce-scatter and accumulation."""
        group, reduce = self._group, self._group.post_backward

        # when the hook is called, which parameters had a gradient is already forgotten
        def post_backward(*unused: Any) -> None:
            self._present = [shard for shard in group.fsdp_params if _has_gradient(shard, group)]
            reduce(*unused)

        group.post_backward = post_backward
        self.module.set_all_reduce_hook(lambda flat: hook(self, flat), stream=stream)  # type: ignore[operator]

    def gradients(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """Views of the flat tensor, without what pads them, by :meth:`tags`; those without elements are left out."""
        sizes = [shard.padded_sharded_param_size.numel() for shard in self._present]
        if sum(sizes) != flat.numel():
            raise LowRankError(
                f"attach_low_rank_reduce: FSDP2 reduces {flat.numel()} elements, and the shards of {self.name!r} and "
                f"those with it have {sum(sizes)}; this torch ({torch.__version__}) packs them in another way."
            )
        tags = self.tags()
        parts = zip(self._present, flat.split(sizes), strict=True)
        return [
            (tags[self._names[id(shard)]], part[: shard.sharded_size.numel()].view(shard.sharded_size))
            for shard, part in parts
            if shard.sharded_size.numel()
        ]


def units_of(model: nn.Module) -> list[Unit]:
    """Of a model and what is in it, in order; parameters are sharded afterwards."""
    from torch.distributed.fsdp import FSDPModule

    names = {id(module): name for name, module in model.named_modules()}
    units: dict[int, Unit] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.reshard()
        state = module._get_fsdp_state()
        try:
            groups = [group for group in state._fsdp_param_groups if group.fsdp_params]
        except AttributeError as error:
            raise LowRankError(
                f"attach_low_rank_reduce: FSDP2 of torch {torch.__version__} keeps its parameters elsewhere ({error})."
            ) from error
        if len(groups) > 1:
            raise LowRankError(
                f"attach_low_rank_reduce: {type(module).__name__} has parameters on {len(groups)} meshes (by "
                "shard_placement_fn), expected one; give each of its parts a fully_shard of its own."
            )
        for group in groups:
            units.setdefault(id(group), Unit(module, group, names))
    return list(units.values())


def _has_gradient(shard: Any, group: Any) -> bool:
    if not hasattr(shard, "_unsharded_param"):
        return False
    if shard.unsharded_accumulated_grad is not None or shard.unsharded_param.grad is not None:
        return True
    return bool(getattr(group, "reduce_scatter_unused_params", False) and shard.unsharded_param.requires_grad)


def _name(shard: Any, names: dict[int, str]) -> str:
    where = shard._module_info
    owner = names.get(id(where.module), "")
    return f"{owner}.{where.param_name}" if owner else str(where.param_name)
