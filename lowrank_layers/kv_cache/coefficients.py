"""The coefficients of old tokens: what grows with every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RUN = 4096
"""Tokens that are converted to another dtype at a time: the converted ones stay in a processor's cache."""


MOST = {torch.float16: 2.0**12, torch.int8: 2.0**12}
"""Greatest coefficients of a first fit, by dtype: read in fp16, whose largest number is sixteen times as great."""


class Coefficients:
    """``[batch, groups, rank, tokens]`` in a floating dtype, or in int8 with an fp16 scale a token and group.

    The tokens come last: a query times the coefficients is then a product of thin and long matrices that both are read
    row by row.

    Args:
        values: the first tokens', in fp32.
        dtype: to be stored in.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.values, self.scales = self._stored(values)

    @property
    def rank(self) -> int:
        """Of each group."""
        return self.values.shape[2]

    @property
    def tokens(self) -> int:
        """How many are held."""
        return self.values.shape[3]

    def append(self, values: Tensor) -> None:
        """More tokens, in fp32."""
        more, scales = self._stored(values)
        self.values = _growing(torch.cat([self.values, more], -1))
        if self.scales is not None and scales is not None:
            self.scales = _growing(torch.cat([self.scales, scales], -1))

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """``[batch, groups, rank, stop - start]``."""
        whole = start == 0 and stop == self.tokens
        values = (self.values if whole else self.values[..., start:stop]).to(dtype)
        if self.scales is None:
            return values
        scales = self.scales if whole else self.scales[..., start:stop]
        return values.mul_(scales[:, :, None].to(dtype))

    def scores(self, rows: Tensor, shift: Tensor) -> Tensor:
        """``rows c + shift``, ``[batch, groups, rows, tokens]``.

        Args:
            rows: ``[batch, groups, rows, rank]``.
            shift: ``[batch, groups, rows, 1]``.
        """
        if self.scales is None and self.dtype == rows.dtype:
            flat = (t.flatten(0, 1) for t in (shift, rows, self.values))
            whole: Tensor = torch.baddbmm(*flat).unflatten(0, rows.shape[:2])
            return whole
        found = []
        for start, stop in self._runs(rows.dtype):
            inner = rows @ self.values[..., start:stop].to(rows.dtype)
            # a scale a token: it weighs the few rows instead of all coefficients
            scales = None if self.scales is None else self.scales[:, :, None, start:stop].to(rows.dtype)
            found.append(inner + shift if scales is None else torch.addcmul(shift, inner, scales))
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def mixed(self, weights: Tensor) -> Tensor:
        """``weights c^T``, ``[batch, groups, rows, rank]``; ``weights`` are ``[batch, groups, rows, tokens]``."""
        found = []
        for start, stop in self._runs(weights.dtype):
            part = weights[..., start:stop]
            if self.scales is not None:
                part = part * self.scales[:, :, None, start:stop].to(part.dtype)
            found.append(part @ self.values[..., start:stop].to(part.dtype).mT)
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def truncate(self, tokens: int) -> None:
        """Leaves the first ones."""
        self.apply(lambda t: t[..., :tokens].contiguous())

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor."""
        self.values = _growing(change(self.values))
        self.scales = None if self.scales is None else _growing(change(self.scales))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is stored, by name."""
        yield "values", self.values
        if self.scales is not None:
            yield "scales", self.scales

    def _runs(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        """All tokens, at once where nothing is converted."""
        if self.dtype == dtype or self.values.device.type != "cpu" or torch.compiler.is_compiling():
            return [(0, self.tokens)]
        return [(start, min(start + RUN, self.tokens)) for start in range(0, max(1, self.tokens), RUN)]

    def _stored(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.dtype != torch.int8:
            return _growing(values.to(self.dtype).contiguous()), None
        # rounding is against the scale as it is stored; its least value keeps rows of zeros from dividing by zero
        scales = (values.abs().amax(2) / 127).clamp_min(2.0**-24).half()
        codes = (values / scales[:, :, None].float()).round().clamp(-127, 127)
        return _growing(codes.to(torch.int8).contiguous()), _growing(scales)


def _growing(x: Tensor) -> Tensor:
    """Says that the last size changes, so that torch.compile does not make a graph for the first one that it meets."""
    if not torch.compiler.is_compiling():
        # what torch._dynamo.maybe_mark_dynamic does, without a second of importing torch._dynamo
        vars(x).update(_dynamo_weak_dynamic_indices={x.ndim - 1}, _has_dynamo_dim_marking=True)
    return x
