"""What is low-rank in a model, in plain values: read off one model, and built into another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import LowRankError
from ..layers import (
    PROJECTIONS,
    FactoredModule,
    Int8Layer,
    LowRankMultiheadAttention,
    is_compressed,
    is_resized,
    mark_resized,
)
from ..layers.config import FactoredSpec, Spec, blank, describe
from .attention import openable_attentions
from .reasons import reason_to_keep
from .tree import walk_layers


@dataclass(frozen=True)
class ModelDescription:
    """The factored layers, those in int8 and the open attentions of a model: what tells it from the dense model.

    Plans and files are made from it.

    Args:
        layers: the factored layers and those in int8, by their first name.
        opened: names of the attentions that stand open.
        resized: settings of the layers that have other numbers of inputs or outputs than in the dense model; of one in
            ``layers`` those of the dense layer that it stands for.
    """

    layers: Mapping[str, FactoredSpec]
    opened: tuple[str, ...] = ()
    resized: Mapping[str, Spec] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelDescription:
        """Returns the description of a model."""
        layers, opened, resized = {}, [], {}
        for name, module in walk_layers(model):
            if isinstance(module, (FactoredModule, Int8Layer)):
                layers[name] = FactoredSpec.of(module)
            elif isinstance(module, LowRankMultiheadAttention):
                opened.append(name)
            if is_resized(module):
                resized[name] = layers[name].dense if name in layers else describe(module)
        return cls(layers, tuple(opened), resized)

    def to_json(self) -> dict[str, Any]:
        """Returns the description as a file holds it."""
        layers = {name: spec.to_json() for name, spec in self.layers.items()}
        resized = {"resized": dict(self.resized)} if self.resized else {}
        return {"layers": layers, "unfused": list(self.opened), **resized}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelDescription:
        """Inverse of :meth:`to_json`; other keys are passed over.

        Raises:
            LowRankError: if a layer's description is damaged, or its class is unknown.
        """
        layers = {}
        for name, each in dict(values["layers"]).items():
            try:
                layers[name] = FactoredSpec.from_json(each)
            except LowRankError as error:
                raise LowRankError(f"{name!r}: {error}") from None
        return cls(layers, tuple(values["unfused"]), dict(values.get("resized", {})))

    def build(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns the modules to replace in a dense model to make it the described one; the layers are uninitialized.

        What the model has already is left out. :func:`replace_` puts the modules in place.

        Args:
            model: a model with the structure that the described one had before it was factorized; not changed.

        Raises:
            LowRankError: if a layer does not fit its description.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        opened = self._open(model, modules)
        built: dict[str, nn.Module] = dict(opened)
        for name, resized in self.resized.items():
            try:
                small = _resized(resized, modules.get(name))
            except LowRankError as error:
                raise LowRankError(f"{name!r}: {error}") from None
            if small is not None:
                built[name] = modules[name] = small
        for name, spec in self.layers.items():
            try:
                new = _layer(spec, modules.get(name))
            except LowRankError as error:
                raise LowRankError(f"{name!r}: {error}") from None
            parent, _, child = name.rpartition(".")
            if new is not None and parent in opened:
                setattr(opened[parent], child, new)
            elif new is not None:
                built[name] = new
        return built

    def _open(self, model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, LowRankMultiheadAttention]:
        """The attentions that are still closed, opened; ``modules`` is given their projections."""
        closed = [name for name in self.opened if not isinstance(modules.get(name), LowRankMultiheadAttention)]
        openable = set(openable_attentions(model).values()) if closed else set()
        opened = {}
        for name in closed:
            attention = modules.get(name)
            if attention not in openable:
                raise LowRankError(f"{name!r}: {_why_not_open(attention)}")
            opened[name] = LowRankMultiheadAttention.from_dense(modules[name], rank=None)
            modules.update({f"{name}.{key}": getattr(opened[name], key) for key in PROJECTIONS})
        return opened


def _why_not_open(attention: nn.Module | None) -> str:
    if not isinstance(attention, nn.MultiheadAttention):
        found = "no such module" if attention is None else f"a {type(attention).__name__}"
        return f"is an open attention, but the model has {found} there; it is for another model."
    reasons = [reason for part in attention.modules() if (reason := reason_to_keep(part)) is not None]
    return f"cannot be opened: {(reasons or ['its parameters are tied to others'])[0]}."


def _resized(spec: Spec, module: nn.Module | None) -> nn.Module | None:
    """The layer with other sizes, uninitialized; ``None`` where the model has it already, or has a low-rank one."""
    if module is None:
        raise LowRankError("the model has no such layer; it is for another model.")
    if is_compressed(module):
        return None
    small = blank(spec).train(module.training)
    if isinstance(module, type(small)) and describe(module) == spec:
        return None
    if type(module) is not type(small):
        raise LowRankError(f"was saved as {spec['type']}, but the model has a {type(module).__name__}.")
    small.to_empty(device=next(iter(module.state_dict().values())).device)
    mark_resized(small)
    return small


def _layer(spec: FactoredSpec, module: nn.Module | None) -> FactoredModule | Int8Layer | None:
    """The described layer, uninitialized; ``None`` where the model has it already."""
    if module is None:
        raise LowRankError("the model has no such layer; it is for another model.")
    if isinstance(module, (FactoredModule, Int8Layer)):
        own = FactoredSpec.of(module)
        if (own.type, own.rank, own.form, own.bits) != (spec.type, spec.rank, spec.form, spec.bits):
            raise LowRankError(f"is {_words(spec)}, but the model has {_words(own)}; load into the dense model.")
        return None
    spec.check_fits(module)
    reason = reason_to_keep(module)
    if reason is not None:
        raise LowRankError(f"cannot be replaced by the low-rank layer: {reason}.")
    return spec.like(module)


def _words(spec: FactoredSpec) -> str:
    """A layer for messages."""
    rank = "" if spec.rank is None else f" of rank {spec.rank}"
    return f"{spec.type}{rank}{'' if spec.bits is None else f' with {spec.bits} bits'}"
