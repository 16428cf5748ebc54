"""The coefficients of old tokens in their subspace, which grow with every token, and the ways of storing them.

:class:`Coefficients` is where fitting, storing and attending meet, and so where another cache algorithm comes in: see
its docstring for the two methods that a way of storing has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 4096
"""Tokens that are converted to another dtype at a time: the converted ones stay in a processor's cache."""
ROOM, ROOM_PART = 64, 1 / 32
"""Tokens, and part of the tokens held, for which there is room once tokens are appended: the greater one counts."""


class Coefficients(ABC):
    """Coefficients ``[batch, groups, rank, tokens]`` of old tokens, stored in some number of bits.

    A way of storing them is a subclass with two methods, :meth:`encode` and :meth:`decode`, and one line in
    :func:`coefficients_for`. Growing, attention over the coefficients, cropping, selecting rows of the batch, counting
    bytes and saving are inherited. A subclass may override :meth:`scores` and :meth:`mixed` with something faster than
    decoding, and :attr:`largest` if it can store only numbers up to some size. Which directions are kept, and how
    many, is decided before, in ``fit.py``.

    The tokens come last: a query times the coefficients is then a product of thin and long matrices that both are read
    row by row.

    Args:
        dtype: dtype of the stored numbers.
        codes: what :meth:`encode` gives for the first tokens; ``None`` for no tokens yet.
    """

    def __init__(self, dtype: torch.dtype, codes: Mapping[str, Tensor] | None = None) -> None:
        self.dtype = dtype
        self._hold(codes or {})

    def __getstate__(self) -> dict[str, object]:
        # what a compiled function reads has addresses, which are not those of a copy
        return {name: value for name, value in vars(self).items() if name not in ("_arguments", "_step")}

    @abstractmethod
    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Coefficients as they are stored.

        Args:
            values: ``[batch, groups, rank, tokens]`` in fp32.

        Returns:
            Tensors by name, each with the batch as its first dimension and the tokens as its last.
        """

    @abstractmethod
    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`encode`, up to rounding.

        Args:
            codes: what :meth:`encode` gave, possibly for some of the tokens only.
            dtype: dtype of the result.
        """

    @property
    def largest(self) -> float:
        """Greatest coefficient that a fit may hand over: the basis is made longer for it."""
        return math.inf

    def empty(self) -> Coefficients:
        """A store of the same kind without tokens."""
        return type(self)(self.dtype)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        for code in self.codes.values():
            return code.shape[-1]
        return 0

    def append(self, values: Tensor) -> None:
        """Stores more tokens.

        Args:
            values: ``[batch, groups, rank, tokens]`` in fp32.
        """
        self.append_codes(self.encode(values))

    def append_codes(self, codes: Mapping[str, Tensor]) -> None:
        """Stores more tokens that are encoded already.

        Args:
            codes: what :meth:`encode` gave.
        """
        held, added = self.tokens, next(code.shape[-1] for code in codes.values())
        if not self.codes:
            self._hold(codes)
        elif torch.compiler.is_compiling():
            self._hold({name: torch.cat([self.codes[name], code], -1) for name, code in codes.items()})
        else:
            for name, buffer in self.room(added).items():
                buffer[..., held : held + added] = codes[name]
            self.show(held + added)

    def room(self, more: int) -> Mapping[str, Tensor]:
        """The buffers of all codes, once there is room for more tokens in them, the same in all.

        What is written behind the tokens held counts once it is shown. So few appended tokens do not copy all others.

        Args:
            more: number of tokens.
        """
        held, buffer = self.tokens, next(iter(self._buffers.values()))
        frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
        if held + more > buffer.shape[-1] or frozen:
            size = held + (max(more, ROOM, int(held * ROOM_PART)) if held else more)
            for name, code in self.codes.items():
                self._buffers[name] = code.new_empty(*code.shape[:-1], size)
                self._buffers[name][..., :held] = code
            self.show(held)
        return self._buffers

    def show(self, tokens: int) -> None:
        """Sets how many tokens are held of those that are written.

        Args:
            tokens: their number.
        """
        self.codes = {name: _growing(buffer[..., :tokens]) for name, buffer in self._buffers.items()}

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The coefficients of a range of tokens, ``[batch, groups, rank, stop - start]``.

        Args:
            start: index of the first token.
            stop: index after the last one.
            dtype: dtype of the result.
        """
        whole = start == 0 and stop == self.tokens
        codes = self.codes if whole else {name: code[..., start:stop] for name, code in self.codes.items()}
        return self.decode(codes, dtype)

    def scores(self, rows: Tensor, shift: Tensor) -> Tensor:
        """``rows c + shift``, ``[batch, groups, rows, tokens]``.

        Args:
            rows: ``[batch, groups, rows, rank]``.
            shift: ``[batch, groups, rows, 1]``.
        """
        return _joined([rows @ self.read(*run, rows.dtype) + shift for run in self._runs(rows.dtype)])

    def tile_scores(self, rows: Tensor, shift: Tensor, tokens: int) -> Tensor:
        """``rows c + shift`` with other rows for every tile, ``[batch, groups, tiles, rows, tokens]``.

        Args:
            rows: ``[batch, groups, tiles, rows, rank]``.
            shift: ``[batch, groups, tiles, rows, tokens]``.
            tokens: number of tokens of a tile; the last tile is filled up.
        """
        return rows @ in_tiles(self.read(0, self.tokens, rows.dtype), tokens) + shift

    def mixed(self, weights: Tensor) -> Tensor:
        """``weights c^T``, ``[batch, groups, rows, rank]``.

        Args:
            weights: ``[batch, groups, rows, tokens]``.
        """
        runs = self._runs(weights.dtype)
        return _summed([weights[..., a:b] @ self.read(a, b, weights.dtype).mT for a, b in runs])

    def truncate(self, tokens: int) -> None:
        """Keeps the first tokens.

        Args:
            tokens: how many.
        """
        if tokens < self.tokens:
            self.apply(lambda code: code[..., :tokens].clone(memory_format=torch.contiguous_format))

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every stored tensor.

        Args:
            change: gives the new tensor for an old one.
        """
        self._hold({name: change(code) for name, code in self.codes.items()})

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every stored tensor by rows of itself.

        Args:
            change: gives the new tensor for an old one.
        """
        self.apply(change)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of everything that is stored, and of the room for more tokens."""
        for name, buffer in self._buffers.items():
            yield name, self.codes[name]
            yield f"{name}.room", buffer[..., self.tokens :]

    def _hold(self, codes: Mapping[str, Tensor]) -> None:
        """Stores these tokens only, without room for more."""
        self._buffers = dict(codes)
        self.codes = {name: _growing(code) for name, code in codes.items()}

    def _runs(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        """All tokens, at once where nothing is converted."""
        on_cpu = all(code.device.type == "cpu" for code in self.codes.values())
        if self.dtype == dtype or not on_cpu or torch.compiler.is_compiling():
            return [(0, self.tokens)]
        return [(start, min(start + RUN, self.tokens)) for start in range(0, max(1, self.tokens), RUN)]


class FloatCoefficients(Coefficients):
    """Coefficients in a floating dtype."""

    @property
    def largest(self) -> float:
        """In fp16 a sixteenth of the largest number, so that later tokens fit in."""
        return 2.0**12 if self.dtype == torch.float16 else math.inf

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The values themselves."""
        return {"values": values.to(self.dtype).contiguous()}

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The values themselves."""
        return codes["values"].to(dtype)

    def scores(self, rows: Tensor, shift: Tensor) -> Tensor:
        """``rows c + shift``, in one product where nothing is converted."""
        if self.dtype != rows.dtype:
            return super().scores(rows, shift)
        flat = (t.flatten(0, 1) for t in (shift, rows, self.codes["values"]))
        whole: Tensor = torch.baddbmm(*flat).unflatten(0, rows.shape[:2])
        return whole


class Int8Coefficients(Coefficients):
    """Coefficients in int8, with one fp16 scale per token and group."""

    @property
    def largest(self) -> float:
        """As in fp16, in which they may be read."""
        return 2.0**12

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Rounded to 255 levels between the extremes of a token."""
        # rounding is against the scale as it is stored; its least value keeps rows of zeros from dividing by zero
        scales = (values.abs().amax(2) / 127).clamp_min(2.0**-24).half()
        levels = (values / scales[:, :, None].float()).round().clamp(-127, 127)
        return {"values": levels.to(torch.int8).contiguous(), "scales": scales}

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Levels times scales."""
        return codes["values"].to(dtype).mul_(codes["scales"][:, :, None].to(dtype))

    def scores(self, rows: Tensor, shift: Tensor) -> Tensor:
        """``rows c + shift``: a token's scale weighs its few scores instead of all of its coefficients."""
        found = []
        for start, stop in self._runs(rows.dtype):
            inner = rows @ self.codes["values"][..., start:stop].to(rows.dtype)
            scales = self.codes["scales"][:, :, None, start:stop].to(rows.dtype)
            found.append(torch.addcmul(shift, inner, scales))
        return _joined(found)

    def mixed(self, weights: Tensor) -> Tensor:
        """``weights c^T``, likewise."""
        found = []
        for start, stop in self._runs(weights.dtype):
            part = weights[..., start:stop] * self.codes["scales"][:, :, None, start:stop].to(weights.dtype)
            found.append(part @ self.codes["values"][..., start:stop].to(weights.dtype).mT)
        return _summed(found)


def coefficients_for(dtype: torch.dtype) -> Coefficients:
    """An empty store for the dtype that a user chose.

    Args:
        dtype: a floating dtype or ``torch.int8``.
    """
    return Int8Coefficients(dtype) if dtype == torch.int8 else FloatCoefficients(dtype)


def in_tiles(x: Tensor, tokens: int) -> Tensor:
    """``[batch, groups, rank, all tokens]`` as ``[batch, groups, tiles, rank, tokens]``, the last tile filled up.

    Args:
        x: coefficients.
        tokens: number of tokens of a tile.
    """
    if left := -x.shape[-1] % tokens:
        x = F.pad(x, (0, left))
    tiles: Tensor = x.unflatten(-1, (-1, tokens)).movedim(-2, 2)
    return tiles


def _joined(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _summed(found: list[Tensor]) -> Tensor:
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def _growing(x: Tensor) -> Tensor:
    """Says that the last size changes, so that torch.compile does not make a graph for the first one that it meets."""
    if not torch.compiler.is_compiling():
        # what torch._dynamo.maybe_mark_dynamic does, without a second of importing torch._dynamo
        vars(x).update(_dynamo_weak_dynamic_indices={x.ndim - 1}, _has_dynamo_dim_marking=True)
    return x
