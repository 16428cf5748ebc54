"""Finding hidden units: outputs of layers that nothing but one other layer reads, each by columns of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...calibrate import forward, layer_input, main_output
from ...calibrate.prefix_memo import PrefixMemo
from ...layers import ConvNd, matrices_of, weight_of
from ...modules import reasons_to_keep, walk_layers
from .cut import columns_of, put_inputs_, take_outputs_

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class HiddenUnits:
    """Units between layers.

    Args:
        producers: the layers of which they are outputs; of a gated unit there are two.
        norms: the batch norms that take the producers' outputs.
        consumer: the layer that reads them.
        count: how many there are.
    """

    producers: tuple[str, ...]
    norms: tuple[str, ...]
    consumer: str
    count: int

    @property
    def layers(self) -> tuple[str, ...]:
        """All the layers that change with the number of units."""
        return *self.producers, *self.norms, self.consumer

    def take_(self, modules: Mapping[str, nn.Module], units: Tensor, matrix: Tensor) -> None:
        """Leaves a model with some of the units.

        Args:
            modules: the modules of the model.
            units: which ones stay.
            matrix: the matrix of the layer that reads them, ``[out, len(units) * area]``.
        """
        for name in (*self.producers, *self.norms):
            take_outputs_(modules[name], units)
        put_inputs_(modules[self.consumer], matrix)


@torch.no_grad()
def find_hidden_units(model: nn.Module, batch: Any, *, with_target: bool) -> list[HiddenUnits]:
    """Returns the hidden units of a model, in the order in which they are read.

    They are found by trying. Where the outputs of a layer are changed, the first other layer whose inputs change is the
    one that reads them. They are hidden units if a change of half of them changes nothing but their own columns of
    these inputs, and if the model without this half gives the same output as the one that reads zeros in its place. The
    output that is compared is that of the stage around them, if there is one, so that time is linear in depth.

    Args:
        model: a model in eval mode, without low-rank layers; it is as before afterwards.
        batch: what it is run on.
        with_target: whether the last item of a tuple batch is the target.
    """
    reasons = reasons_to_keep(model)
    layers = {name: each for name, each in walk_layers(model) if name and name not in reasons}
    movable = {name: each for name, each in layers.items() if type(each) in _LAYERS and getattr(each, "groups", 1) == 1}
    found: list[HiddenUnits] = []
    if not movable:
        return found
    with PrefixMemo(model, with_target=with_target, mask=None) as memo:
        trial = _Trial(model, memo, batch, with_target, movable)
        readers: dict[str, list[str]] = {}
        for name in trial.inputs:
            reader = trial.reader(name)
            if reader is not None:
                readers.setdefault(reader, []).append(name)
        norms = {name: each for name, each in layers.items() if type(each) in _NORMS}
        after = trial.norms_after(norms)
        for consumer in trial.inputs:
            producers, layer = readers.get(consumer, []), movable[consumer]
            counts = {len(weight_of(movable[name])) for name in producers}
            inputs, count = weight_of(layer).shape[1], max(counts, default=0)
            if len(counts) != 1 or count < 2 or inputs % count or (inputs != count and isinstance(layer, ConvNd)):
                continue
            behind = tuple(after[name] for name in producers if name in after)
            units = HiddenUnits(tuple(producers), behind, consumer, count)
            if all(trial.keeps_apart(name, units) for name in producers) and trial.are_hidden(units):
                found.append(units)
    return found


class _Reached(Exception):
    """Ends a forward pass that has gone far enough."""


class _Trial:
    """A model that is run on one batch, changed here and there.

    Args:
        model: the model.
        memo: what remembers a pass of it.
        batch: the batch.
        with_target: whether the last item of a tuple batch is the target.
        layers: the layers that may produce or read units.

    Attributes:
        inputs: the input of every layer at its first call, in order of these calls.
    """

    def __init__(
        self, model: nn.Module, memo: PrefixMemo, batch: Any, with_target: bool, layers: dict[str, nn.Module]
    ) -> None:
        self.model, self.batch, self.with_target, self.layers = model, batch, with_target, layers
        self.inputs: dict[str, Tensor] = {}
        self._memo = memo
        with self._hooked({name: self._remember(name) for name in layers}):
            self._known = memo.add(batch)

    def reader(self, name: str) -> str | None:
        """Returns the first layer after this one whose input changes with its output; ``None`` for no other one."""
        reached: list[str] = []

        def compare(other: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if other != name and not torch.equal(layer_input(args, kwargs), self.inputs[other]):
                    reached.append(other)
                    raise _Reached

            return hook

        with suppress(_Reached), self._changed(name), self._hooked({other: compare(other) for other in self.inputs}):
            self._memo.rerun(self._known, name)
        return reached[0] if reached else None

    def keeps_apart(self, name: str, units: HiddenUnits) -> bool:
        """Returns whether every second output of a layer changes only its own columns where the units are read."""
        same = False

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal same
            pair = (layer_input(args, kwargs), self.inputs[units.consumer])
            found, before = (_by_unit(module, x, units.count)[..., ::2, :] for x in pair)
            same = torch.equal(found, before)
            raise _Reached

        with suppress(_Reached), self._changed(name, slice(1, None, 2)), self._hooked({units.consumer: compare}):
            self._memo.rerun(self._known, name)
        return same

    def norms_after(self, norms: dict[str, nn.Module]) -> dict[str, str]:
        """Returns the batch norm that takes a layer's output as it is, by the name of the layer."""
        outputs: dict[int, tuple[str, Tensor]] = {}
        after: dict[str, str] = {}
        if not norms:
            return after

        def remember(name: str) -> Any:
            return lambda module, args, output: outputs.__setitem__(id(output), (name, output))

        def look(norm: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if id(args[0]) in outputs:
                    after[outputs[id(args[0])][0]] = norm

            return hook

        with ExitStack() as hooks:
            for name in self.inputs:
                hooks.callback(self.layers[name].register_forward_hook(remember(name)).remove)
            for name, norm in norms.items():
                hooks.callback(norm.register_forward_pre_hook(look(name), with_kwargs=True).remove)
            forward(self.model, self.batch, with_target=self.with_target)
        return after

    def are_hidden(self, units: HiddenUnits) -> bool:
        """Returns whether the model without every second unit gives what it gives where its reader reads zeros."""

        def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            _by_unit(module, x, units.count)[..., 1::2, :] = 0
            return x, *args[1:]

        stage = self._memo.stage_around(units.layers)
        before = self._outputs(units, stage)
        handle = self.layers[units.consumer].register_forward_pre_hook(silence)
        try:
            silenced = self._outputs(units, stage)
        finally:
            handle.remove()
        modules = dict(self.model.named_modules())
        kept, reader = torch.arange(0, units.count, 2), modules[units.consumer]
        with _unchanged([modules[name] for name in units.layers]):
            units.take_(modules, kept, matrices_of(reader)[0][:, columns_of(reader, kept, units.count)])
            try:
                without = self._outputs(units, stage)
            except Exception:
                return False  # something expects the size that was, and says so in its own way
        triples = zip_longest(before, silenced, without)
        return bool(before) and all(None not in each and _are_near(*each) for each in triples)

    def _outputs(self, units: HiddenUnits, stage: str | None) -> list[Tensor]:
        """The tensors that a stage returns, or the first one that the model does, from the producers on."""
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            raise _Reached

        if stage is None:
            main = main_output(self._memo.rerun(self._known, units.producers[0]))
            return [] if main is None else [main]
        handle = self.model.get_submodule(stage).register_forward_hook(take)
        try:
            with suppress(_Reached):
                self._memo.rerun(self._known, units.producers[0])
        finally:
            handle.remove()
        return found

    @contextmanager
    def _changed(self, name: str, which: slice = slice(None)) -> Iterator[None]:
        """Adds numbers between 1 and 2 to some of the outputs of a layer."""

        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            chosen = _by_unit(module, output, len(weight_of(module)))[..., which, :]
            chosen += torch.linspace(1, 2, chosen.numel()).view(chosen.shape).to(chosen)
            return output

        handle = self.layers[name].register_forward_hook(change)
        try:
            yield
        finally:
            handle.remove()

    def _remember(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs.setdefault(name, layer_input(args, kwargs))

        return hook

    @contextmanager
    def _hooked(self, hooks: Mapping[str, Any]) -> Iterator[None]:
        """Registers forward pre-hooks on some layers."""
        with ExitStack() as undo:
            for name, hook in hooks.items():
                undo.callback(self.layers[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _by_unit(layer: nn.Module, x: Tensor, count: int) -> Tensor:
    """The input or output of a linear layer or convolution, seen as ``[..., count, columns of a unit]``."""
    axis = -1 - len(getattr(layer, "kernel_size", ()))
    units: Tensor = x.movedim(axis, -1).unflatten(-1, (count, -1))
    return units


def _are_near(before: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are one up to rounding, and up to a thousandth of how far they are from a third one.

    Each entry of the last dimension has its own scale: in the stream of a transformer some are a thousand times larger.
    """
    if torch.equal(one, other) or one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    rounding = max(1e-5, 8 * torch.finfo(one.dtype).eps) * _largest(one)
    return bool((_largest(one - other) <= torch.maximum(rounding, 1e-3 * _largest(one - before))).all())


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of each entry of the last dimension."""
    return x.abs().reshape(-1, x.shape[-1] if x.ndim else 1).amax(0)


@contextmanager
def _unchanged(modules: list[nn.Module]) -> Iterator[None]:
    """Gives modules back their parameters, buffers and attributes afterwards."""
    states = [(module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in states:
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
