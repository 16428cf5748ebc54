"""The projections to keys and values in a model, and the moments that calibration knows of what they put out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..calibrate.statistics import LayerStats, Statistics
from ..errors import LowRankError

_NORMS = ("k_norm", "k_layernorm", "key_norm", "key_layernorm")
"""Names of norms that come after the projection to keys."""


@dataclass(frozen=True)
class Projection:
    """A projection to keys or to values, and its statistics.

    Args:
        label: its name in the model.
        layer: the linear layer.
        stats: the statistics of the layer.
    """

    label: str
    layer: nn.Linear
    stats: LayerStats

    def mean(self) -> Tensor:
        """The mean of its outputs, in fp64."""
        weight = self._weight()
        bias = 0 if self.layer.bias is None else self.layer.bias.detach().to(weight)
        return weight @ self.stats.inputs.mean + bias

    def covariance(self) -> Tensor:
        """The second moment of its outputs about their mean, in fp64."""
        weight = self._weight()
        return weight @ self.stats.inputs.covariance() @ weight.mT

    def _weight(self) -> Tensor:
        return self.layer.weight.detach().to(self.stats.inputs.mean)


def projections_of(
    model: nn.Module, stats: Statistics, head_size: int, keys: str, values: str
) -> list[tuple[Projection, Projection]]:
    """The projections of every layer, in the order of the modules.

    Args:
        model: a model with modules that have the two projections as children.
        stats: statistics of this model.
        head_size: number of entries per head.
        keys: name of the projection to keys.
        values: name of the projection to values.

    Raises:
        LowRankError: if no module has such children, one was not calibrated, or keys are not what a projection puts
            out.
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        pair = [(f"{name}.{child}" if name else child, children.get(child)) for child in (keys, values)]
        sides = [(label, layer) for label, layer in pair if isinstance(layer, nn.Linear)]
        if len(sides) < 2:
            continue
        _check_norm(name, children)
        made = [_projection(label, layer, stats, head_size) for label, layer in sides]
        found.append((made[0], made[1]))
    if not found:
        raise LowRankError(
            f"kv_subspaces: no module has linear layers {keys!r} and {values!r}; give their names as keys= and values=,"
            " and split a layer that makes queries, keys and values at once (qkv_proj, c_attn) into three. For a model"
            " of transformers, calibrate_kv needs neither."
        )
    return found


def by_group(matrix: Tensor, width: int) -> Tensor:
    """The blocks on the diagonal of a matrix, ``[1, groups, width, width]``.

    Args:
        matrix: ``[groups * width, groups * width]``.
        width: number of entries per group.
    """
    blocks: Tensor = matrix.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2)
    return blocks.movedim(-1, 0)[None]


def _projection(label: str, layer: nn.Linear, stats: Statistics, head_size: int) -> Projection:
    if label not in stats:
        raise LowRankError(f"kv_subspaces: {label!r} was not calibrated; give stats=calibrate(model, batches).")
    if layer.out_features % head_size:
        raise LowRankError(f"kv_subspaces: {label!r} has {layer.out_features} outputs, no multiple of {head_size}.")
    return Projection(label, layer, stats[label])


def _check_norm(name: str, children: dict[str, nn.Module]) -> None:
    norm = next((child for child in _NORMS if not isinstance(children.get(child, nn.Identity()), nn.Identity)), None)
    if norm is not None:
        raise LowRankError(
            f"kv_subspaces: {name!r} applies {norm!r} to what its projection puts out, so that calibration has not seen"
            " the keys of its cache; use calibrate_kv for a model of transformers, or leave subspaces= out."
        )
