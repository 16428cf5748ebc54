"""Which layers are given the same tensors: queries, keys and values, or the gate and the first layer of an MLP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import ConvNd, is_embedding, linear_shape
from .run import layer_input


class SharedInputs:
    """Looks at the calls of all layers in one forward pass.

    Args:
        layers: the layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._reads: dict[str, tuple[int, ...]] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._held: list[Tensor] = []  # so that no other tensor takes the place of one that was seen
        self._count = 0

    def look(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes one call.

        Args:
            name: name of the layer; others than those that are looked at are left out.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        layer = self._layers.get(name)
        if layer is None or isinstance(layer, ConvNd) or is_embedding(layer):
            return
        x = layer_input(args, kwargs)
        key = id(x), x._version
        if key not in self._numbers:
            self._numbers[key] = self._count
            self._count += 1
            self._held.append(x)
        self._reads[name] = (*self._reads.get(name, ()), self._numbers[key])

    def end_stage(self) -> None:
        """Lets go of the tensors that were seen."""
        self._numbers.clear()
        self._held.clear()

    def leaders(self, names: Iterable[str]) -> dict[str, str]:
        """Returns, for each layer that was given the same tensors as another one before it, the name of that.

        Args:
            names: the layers to choose from.
        """
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        among = set(names)
        for name, read in self._reads.items():
            if name in among:
                leader = first.setdefault((read, linear_shape(self._layers[name])[2]), name)
                if leader != name:
                    found[name] = leader
        return found
