"""The shards of FSDP2: the only file that reads private attributes of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LowRankError

KNOWN = ((2, 11), (2, 13))
"""The first and the last version of torch whose private attributes are as they are read here."""


def check_version() -> None:
    """Raises for a version of torch whose private attributes may differ."""
    numbers = torch.__version__.split(".")[:2]
    version = tuple(int(number) if number.isdigit() else -1 for number in numbers)
    if not KNOWN[0] <= version <= KNOWN[1]:
        first, last = (".".join(map(str, version)) for version in KNOWN)
        raise LowRankError(
            f"attach_low_rank_reduce: got torch {torch.__version__}, expected {first} to {last}: FSDP2 keeps the shapes"
            " of shards in private attributes, which are known for these versions only. Install one of them, or shard"
            " over a 2-d mesh (native HSDP, whole gradients)."
        )


class FSDPUnit:
    """The parameters of one ``fully_shard``, whose gradients FSDP2 reduces as one flat tensor.

    Args:
        module: the module that was given to ``fully_shard``.
        group: FSDP2's group of its parameters.
        names: names of all modules of the model by ``id``.
    """

    def __init__(self, module: nn.Module, group: Any, names: dict[int, str]) -> None:
        self.module, self._group = module, group
        self._present: list[Any] = []
        self._names = {id(shard): _name(shard, names) for shard in group.fsdp_params}

    @property
    def name(self) -> str:
        """The name of its first parameter."""
        return next(iter(self._names.values()), "")

    @property
    def device(self) -> torch.device:
        """The device of gradients when they are reduced."""
        device: torch.device = self._group.device
        return device

    @property
    def replicated(self) -> bool:
        """Whether FSDP2 averages over replicas itself."""
        return self._group.mesh_info.replicate_mesh_dim is not None

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The processes that together hold a replica."""
        group: dist.ProcessGroup = self._group.mesh_info.shard_process_group
        return group

    @property
    def hooked(self) -> bool:
        """Whether it has an all-reduce hook."""
        return self._group._all_reduce_hook is not None

    @property
    def all_reduces(self) -> bool:
        """The value that ``set_requires_all_reduce`` was given."""
        return bool(self._group.all_reduce_grads)

    def parameters(self) -> dict[str, Tensor]:
        """The shards of this process, by the parameters' names."""
        shards = {self._names[id(shard)]: shard.sharded_param for shard in self._group.fsdp_params}
        return {name: p.to_local().detach().requires_grad_(p.requires_grad) for name, p in shards.items()}

    def tags(self) -> dict[str, str]:
        """Names with the number of the shard, since each shard has an error of its own; by the parameters' names."""
        place = self.shard_group.rank()
        return {name: f"{name}:shard{place}" for name in self._names.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of whole parameters, by name."""
        return {self._names[id(shard)]: tuple(shard.sharded_param.shape) for shard in self._group.fsdp_params}

    def on_reduce(self, hook: Callable[[FSDPUnit, Tensor], None], stream: torch.cuda.Stream | None) -> None:
        """Calls a hook between reduce-scatter and accumulation.

        Args:
            hook: called as ``hook(unit, flat)``, with the unit's gradients in one flat tensor.
            stream: the CUDA stream of the hook; ``None`` is that of FSDP2.
        """
        group, reduce = self._group, self._group.post_backward

        # when the hook is called, FSDP2 has already dropped the gradients of whole parameters
        def post_backward(*unused: Any) -> None:
            self._present = [shard for shard in group.fsdp_params if _has_gradient(shard, group)]
            reduce(*unused)

        group.post_backward = post_backward
        self.module.set_all_reduce_hook(lambda flat: hook(self, flat), stream=stream)  # type: ignore[operator]

    def gradients(self, flat: Tensor) -> list[tuple[str, Tensor]]:
        """The gradients in the flat tensor by :meth:`tags`: views without padding, and without empty shards."""
        sizes = [shard.padded_sharded_param_size.numel() for shard in self._present]
        if sum(sizes) != flat.numel():
            raise LowRankError(
                f"attach_low_rank_reduce: FSDP2 reduces {flat.numel()} elements, and the shards of {self.name!r} and "
                f"those with it have {sum(sizes)}; this torch ({torch.__version__}) packs them differently."
            )
        tags = self.tags()
        parts = zip(self._present, flat.split(sizes), strict=True)
        return [
            (tags[self._names[id(shard)]], part[: shard.sharded_size.numel()].view(shard.sharded_size))
            for shard, part in parts
            if shard.sharded_size.numel()
        ]


def units_of(model: nn.Module) -> list[FSDPUnit]:
    """The units of a model and its parts, in order; their parameters are sharded afterwards."""
    from torch.distributed.fsdp import FSDPModule

    names = {id(module): name for name, module in model.named_modules()}
    units: dict[int, FSDPUnit] = {}
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
            units.setdefault(id(group), FSDPUnit(module, group, names))
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
