"""Following the padding of a batch through a model, by the masks that its modules are called with."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..layers import ConvNd, LowRankMultiheadAttention
from .batch_masks import MaskOf, find_mask, labelled, read_mask
from .leave_out import MASKS, LeaveOut, with_masks
from .masks import DataRows, find_data_rows, mask_of_rows, may_run_over, output_mask

_OWN = ("decoder_attention_mask", *MASKS)
"""Masks of the sequence that a module works on."""
_OTHER = {
    "encoder_hidden_states": "encoder_attention_mask",
    "memory": "memory_key_padding_mask",
    "key": "key_padding_mask",
    "value": "key_padding_mask",
}
"""Tensors of another sequence, and their masks."""
_MEMORY = ("encoder_hidden_states", "memory")
"""Arguments by which a decoder is given its encoder's states."""
_OF_A_PLACE = ("_scopes", "_decoder", "_encoder", "_two", "_decoded", "_read")
"""Fields of :class:`Padding` that say what holds at one place of a pass."""


@dataclass(eq=False)
class _Mask:
    real: Tensor
    full: bool


@dataclass(eq=False)
class _Scope:
    """What holds inside one call of a module.

    Args:
        masks: the masks that may apply, the likeliest first.
        own: the mask that the module was called with.
        decodes: whether it is a decoder or lies in one.
        time_first: whether time comes before the batch.
    """

    masks: list[_Mask]
    own: _Mask | None
    decodes: bool
    time_first: bool


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What :class:`Padding` knows at one place of a forward pass.

    Args:
        fields: its own fields.
        tags: the masks of the tensors that are at hand there.
    """

    fields: dict[str, Any]
    tags: list[list[_Mask]]


class Padding(threading.local):
    """Follows the masks of every forward pass of a model, as a context manager.

    What it knows of a pass belongs to the thread in which the pass runs.

    Every module that is called with ``attention_mask`` or ``*_key_padding_mask`` of shape ``[B, T]`` sets the mask of
    what happens inside it. A decoder takes its own, and what an encoder returned keeps the encoder's. Where a decoder,
    or a model, has none, the labels of the batch give it: what follows the last label other than -100 is padding.

    Args:
        model: the model whose forward passes are followed.
        mask: how the mask of a batch is found, where the model is called with none, or what its masks leave out.
    """

    def __init__(self, model: nn.Module, mask: MaskOf | None = None) -> None:
        self.model = model
        self.mask = mask
        self._hooks: list[Any] = []
        self._scopes: list[_Scope] = []
        self._given: Tensor | None = None
        self._target: object = None
        self._decoder: _Mask | None = None
        self._encoder: list[_Mask] = []
        self._two = self._decoded = False
        self._states: Any = WeakTensorKeyDictionary()
        self._read: Any = WeakTensorKeyDictionary()

    def __enter__(self) -> Padding:
        for module in self.model.modules():
            if module is self.model or next(module.children(), None) is not None:
                names = _arguments(type(module).forward)
                enter = self._enter(names, _time_first(module))
                self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._scopes.clear()

    def start(self, batch: Any, target: object = None) -> None:
        """Prepares the next forward pass.

        Args:
            batch: its batch.
            target: the target beside the inputs, whose labels may tell where a sample ends.
        """
        self._given = None if self.mask is None or isinstance(self.mask, LeaveOut) else find_mask(batch, self.mask)
        self._target = target

    def snapshot(self, tensors: Sequence[Tensor]) -> Snapshot:
        """Returns what is known at this place of the pass, for :meth:`resumed`.

        Args:
            tensors: the tensors that are at hand there.
        """
        fields = {name: getattr(self, name) for name in _OF_A_PLACE}
        return Snapshot(fields | {"_scopes": [replace(scope) for scope in self._scopes]}, self.tags(tensors))

    @contextmanager
    def resumed(self, snapshot: Snapshot, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Sets this thread back to an earlier place of a pass inside, to run a part of it again.

        Args:
            snapshot: what was known there.
            tensors: those that are in the place of the ones that it was made with.
        """
        before = {name: getattr(self, name) for name in (*_OF_A_PLACE, "_states")}
        vars(self).update(snapshot.fields, _scopes=[replace(scope) for scope in snapshot.fields["_scopes"]])
        self._states = WeakTensorKeyDictionary()
        self.tag(tensors, snapshot.tags)
        try:
            yield
        finally:
            vars(self).update(before)

    def tags(self, tensors: Sequence[Tensor]) -> list[list[_Mask]]:
        """Returns which masks are known to belong to each of the tensors.

        Args:
            tensors: the tensors.
        """
        return list(map(self._tagged, tensors))

    def tag(self, tensors: Sequence[Tensor], tags: Sequence[list[_Mask]]) -> None:
        """Says which masks belong to each of the tensors.

        Args:
            tensors: the tensors.
            tags: what :meth:`tags` returned of those in whose place they are.
        """
        for tensor, masks in zip(tensors, tags, strict=True):
            for mask in masks:
                self._states[tensor] = mask

    def samples(self) -> int | None:
        """Returns how many samples of the forward pass have data; ``None`` where no mask is known."""
        known = [mask.real.flatten(1).any(1).cpu() for mask in self._scopes[0].masks] if self._scopes else []
        return int(torch.stack(known).any(0).sum()) if known and len({len(k) for k in known}) == 1 else None

    def of(self, module: nn.Module, x: Tensor, batched: Tensor) -> DataRows | None:
        """Returns which rows of a layer's input are data; ``None`` where all are.

        Args:
            module: the layer.
            x: its input.
            batched: the same with a batch dimension.
        """
        if not self._scopes:
            return None
        scope = self._scopes[-1]
        for mask in [*self._tagged(x), *self._now(scope)]:
            mask.real = mask.real.to(batched.device)
            found = find_data_rows(mask.real, module, batched, time_first=scope.time_first, full=mask.full)
            if found is None:
                continue
            if isinstance(module, ConvNd) and not mask.full:
                self._derive(output_mask(mask.real, module, batched, found.inputs))
            return None if mask.full else found
        return None

    def of_activation(self, x: Tensor, lead: tuple[int, ...]) -> Tensor | None:
        """Returns the mask of an activation's rows, true at data; ``None`` where all are.

        Args:
            x: what a module inside the model returned.
            lead: its sizes without that of the features.
        """
        if not self._scopes:
            return None
        scope = self._scopes[-1]
        for mask in [*self._tagged(x), *self._now(scope)]:
            found = mask_of_rows(mask.real.to(x.device), lead, time_first=scope.time_first)
            if found is not None:
                return None if mask.full else found[0]
        return None

    def of_output(self, output: Tensor | None) -> Tensor | None:
        """Returns the mask of the model's output, ``[B, T]`` or ``[T, B]`` as it is; ``None`` where all is data."""
        masks = self._base()
        if output is None or not masks:
            return None
        mask = next((m for m in masks if may_run_over(m.real, tuple(output.shape))), masks[0])
        mask.real = mask.real.to(output.device)
        if mask.full:
            return None
        order = [mask.real.mT, mask.real] if self._scopes[0].time_first else [mask.real, mask.real.mT]
        return next((real for real in order if real.shape == output.shape[:2]), mask.real)

    def _base(self) -> list[_Mask]:
        return self._now(self._scopes[0]) if self._scopes else []

    def _enter(self, names: tuple[str, ...], late: bool | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if in_backward():  # recomputation; what it leaves half-way it would leave on the stack
                return
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            if module is self.model:
                self._scopes = [self._first(tensors, late)]
            elif self._scopes:
                self._scopes.append(self._inner(tensors, self._scopes[-1], late))
            for name, mask_name in _OTHER.items():
                mask, states = self._mask(mask_name, tensors), tensors.get(name)
                if states is not None and mask is not None and may_run_over(mask.real, tuple(states.shape)):
                    self._states[states] = mask
                elif name in _MEMORY and states is not None and states.ndim > 2 and states not in self._states:
                    # another sequence without a mask: that of the decoder is not its
                    self._states[states] = self._mask_of(states.new_ones(states.shape[:2], dtype=torch.bool))

        return hook

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        if in_backward() or module is self.model or len(self._scopes) < 2:
            return
        scope = self._scopes.pop()
        if scope.own is None:
            return
        values = output.values() if isinstance(output, Mapping) else output
        for value in values if isinstance(output, (Mapping, tuple, list)) else [output]:
            if isinstance(value, Tensor) and value.ndim > 2 and may_run_over(scope.own.real, tuple(value.shape)):
                self._states[value] = scope.own

    def _first(self, tensors: dict[str, Tensor], late: bool | None) -> _Scope:
        """The scope of the model itself."""
        self._states.clear()
        self._read.clear()
        config = getattr(self.model, "config", None)
        pair = _is_pair(tensors) or bool(getattr(config, "is_encoder_decoder", False))
        label_mask = labelled(tensors.get("labels", self._target))
        if isinstance(self.mask, LeaveOut):
            tensors = with_masks(tensors, pair=pair, labelled=label_mask is not None, time_first=bool(late))
        own = self._own(tensors)
        labels = [] if label_mask is None else [self._mask_of(label_mask)]
        given = [] if self._given is None else [self._mask_of(self._given)]
        self._two, self._decoded = pair and not given, False
        decoder = given or labels
        if not given and "decoder_attention_mask" in tensors:
            decoder = [own[0]]
        elif not given and not pair and own:
            decoder = []
        self._decoder = decoder[0] if decoder else None
        self._encoder = [mask for mask in own if mask not in decoder]
        return _Scope([*decoder, *self._encoder], None, _has_memory(tensors), bool(late))

    def _inner(self, tensors: dict[str, Tensor], outer: _Scope, late: bool | None) -> _Scope:
        """The scope of a module inside the model."""
        own = self._own(tensors)
        late = outer.time_first if late is None else late
        decodes = outer.decodes or _has_memory(tensors)
        self._decoded = self._decoded or decodes
        if _is_pair(tensors):  # both sequences, as in the model itself
            return _Scope([*own, *(mask for mask in outer.masks if mask not in own)], None, decodes, late)
        if own:
            shapes = {mask.real.shape for mask in own}
            return _Scope([*own, *(m for m in outer.masks if m.real.shape not in shapes)], own[0], decodes, late)
        if decodes and not outer.decodes:
            return _Scope([] if self._decoder is None else [self._decoder], self._decoder, True, late)
        held = list(tensors.values())
        inside = not held or any(may_run_over(m.real, tuple(t.shape)) for m in self._now(outer) for t in held)
        return _Scope(outer.masks if inside else [], None, decodes, late)

    def _now(self, scope: _Scope) -> list[_Mask]:
        """The masks of a scope; of two sequences, the encoder's until a decoder is entered, then the decoder's."""
        if not self._two:
            return scope.masks
        other = self._encoder if self._decoded else [self._decoder]
        return [mask for mask in scope.masks if mask not in other]

    def _own(self, tensors: dict[str, Tensor]) -> list[_Mask]:
        names = [name for name in _OWN if name != "key_padding_mask" or "key" not in tensors]
        found = (self._mask(name, tensors) for name in names)
        return [mask for mask in found if mask is not None]

    def _mask(self, name: str, tensors: dict[str, Tensor]) -> _Mask | None:
        value = tensors.get(name)
        if value is None:
            return None
        if value not in self._read:
            real = read_mask(name, value)
            self._read[value] = None if real is None else self._mask_of(real)
        found: _Mask | None = self._read[value]
        return found

    def _mask_of(self, real: Tensor) -> _Mask:
        real = self.mask.narrow(real) if isinstance(self.mask, LeaveOut) else real
        return _Mask(real, bool(real.all()))

    def _tagged(self, x: Tensor) -> list[_Mask]:
        found = self._states.get(x)
        if found is None and x._base is not None:
            found = self._states.get(x._base)
        return [] if found is None else [found]

    def _derive(self, real: Tensor) -> None:
        """A convolution's output has positions of its own; they are known from here on."""
        for scope in self._scopes:
            if all(mask.real.shape != real.shape for mask in scope.masks):
                scope.masks = [*scope.masks, _Mask(real, full=False)]


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside it is a recomputation (activation checkpointing)."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


def _has_memory(tensors: dict[str, Tensor]) -> bool:
    return any(name in tensors for name in _MEMORY)


def _time_first(module: nn.Module) -> bool | None:
    """Whether time comes before the batch inside, as ``batch_first=False`` says; ``None`` if nothing says so."""
    if isinstance(module, LowRankMultiheadAttention):
        return False  # it transposes
    return True if any(getattr(m, "batch_first", True) is False for m in module.modules()) else None


def _is_pair(tensors: dict[str, Tensor]) -> bool:
    return any(name.startswith("decoder_") for name in tensors)


def _arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)[1:]
    except (TypeError, ValueError):
        return ()
