"""A model whose low-rank layers are chains of ordinary ones, so that each of their factors is a layer by itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from ...layers import FactoredModule, LowRankLinear, PairConv, PivotConv, PivotLinear, bias_of, is_resized, weight_of
from ...layers.conv_base import FactoredConv, TransposedConv
from ...modules import replace_, walk_layers


@dataclass(frozen=True)
class Chained:
    """A model, and its copy in which each low-rank layer is an ``nn.Sequential`` of its factors.

    Args:
        work: the copy, in eval mode.
        modules: the modules of the model, by their names in the copy.
        factored: the low-rank layers of the model, by the names of the sequences in their place; pairs that stand for
            those in pivot form.
        pivots: the layers in pivot form, by their names.
    """

    work: nn.Module
    modules: dict[str, nn.Module]
    factored: dict[str, FactoredModule]
    pivots: dict[str, PivotLinear | PivotConv]

    @classmethod
    def of(cls, model: nn.Module) -> Chained:
        """Returns the two of them; the model is not changed."""
        modules = dict(walk_layers(model))
        found = {name: layer for name, layer in modules.items() if isinstance(layer, FactoredModule)}
        pivots = {name: layer for name, layer in found.items() if name and isinstance(layer, (PivotLinear, PivotConv))}
        pairs = {name: layer.to_pair() for name, layer in pivots.items()}
        factored = {name: pairs.get(name, layer) for name, layer in found.items() if name and _is_chain(layer)}
        modules.update(pairs)
        work = copy.deepcopy(model)
        copies = {name: layer for name, layer in walk_layers(work) if isinstance(layer, FactoredModule)}
        copies.update(copy.deepcopy(pairs))
        replace_(work, {name: nn.Sequential(*copies[name].parts) for name in factored})
        work.requires_grad_(False).eval()
        for name, layer in factored.items():
            modules.update({f"{name}.{k}": part for k, part in enumerate(layer.parts)})
        return cls(work, modules, factored, pivots)

    def restore_pivots_(self, model: nn.Module) -> None:
        """Gives the layers in pivot form the sizes and values of the pairs that stand for them, in place."""
        new: dict[str, nn.Module] = {}
        for name, pivot in self.pivots.items():
            pair = self.factored[name]
            if is_resized(pair) and isinstance(pivot, PivotConv):
                assert isinstance(pair, PairConv)
                new[name] = pivot.of_pair(pair)
            elif is_resized(pair):
                assert isinstance(pair, LowRankLinear)
                assert isinstance(pivot, PivotLinear)
                new[name] = pivot.of_pair(pair)
        replace_(model, new)

    def owner(self, name: str) -> nn.Module:
        """Returns the layer of the model of which a layer of the copy is a factor, or which it is itself."""
        return self.factored.get(name.rpartition(".")[0], self.modules[name])

    def biased(self, name: str) -> nn.Module | None:
        """Returns the layer of the model whose bias can shift the outputs of a layer of the copy, if there is one.

        It is the layer itself, or the second factor of a pair, if that is pointwise.
        """
        layer, owner = self.modules[name], self.owner(name)
        if isinstance(owner, FactoredModule) and bias_of(layer) is None:
            pointwise = set(getattr(owner.last, "kernel_size", ())) <= {1}
            layer = owner.last if owner.parts[0] is layer and len(owner.parts) == 2 and pointwise else layer
        return None if bias_of(layer) is None else layer


def _is_chain(layer: FactoredModule) -> bool:
    """Whether a low-rank layer calls its factors one after the other and does nothing else, or a pair can."""
    return isinstance(layer, (LowRankLinear, FactoredConv)) and not isinstance(layer, TransposedConv)


def adopt_sizes_(layer: FactoredModule) -> None:
    """Sets the numbers of inputs and outputs of a low-rank layer to those of its factors."""
    sizes = {"in": weight_of(layer.parts[0]).shape[1], "out": weight_of(layer.last).shape[0]}
    for side, size in sizes.items():
        setattr(layer, f"{side}_{'features' if isinstance(layer, LowRankLinear) else 'channels'}", size)
