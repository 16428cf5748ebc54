"""Coefficients with bits by direction: 8, 4, 3, 2, 1 or none, packed into bytes, and one gain per token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import encode_kernel
from .bit_planes import packed, unpacked
from .coefficients import Coefficients, in_tiles
from .quantizers import WIDTHS

LEAST_GAIN, GAINS = -36, 64
"""A token's gain is ``2^(g / PER_OCTAVE)`` with one of the ``GAINS`` integers from ``LEAST_GAIN`` on."""
PER_OCTAVE = 8
"""Gains from one power of two to the next: with 2 of them the errors are 3 to 5 % greater, and bytes as many."""
COARSE = 16
"""Every so many gains one is tried, and then those half as far from the best, until they are neighbours."""
RUN = 128
"""Tokens that are encoded at a time: what is computed on the way stays in a processor's cache."""


class BitCoefficients(Coefficients):
    r"""Coefficients in units of their quantizer's step, as :math:`2^{g_t / 8} (u_{i,t} - (2^{w_i} - 1) / 2)`.

    The level :math:`u` has the width :math:`w` of its direction. The gain of a token is the one of least error: with it
    tokens far outside of the quantizers' range (outliers) are not clipped, and small ones (attention sinks) stay small.

    Args:
        widths: numbers of directions with each of ``WIDTHS`` bits, which fill the bytes of all planes.
        weights: weights of the directions' squared errors, ``[1 or batch, groups, rank]``.
        codes: what :meth:`encode` gave for the first tokens; ``None`` for no tokens yet.
    """

    def __init__(self, widths: Sequence[int], weights: Tensor, codes: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(torch.uint8, codes)
        self.widths, self.weights = tuple(widths), weights

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Levels and gains, the directions of one width packed into bytes."""
        if encode_kernel.applies(values):
            return encode_kernel.encode(values, self.weights, self.widths, LEAST_GAIN, GAINS)
        parts = [self._encode(part) for part in values.split(RUN, -1)]
        return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}

    def decode(self, codes: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Levels about zero, times gains."""
        levels = unpacked(codes, self.widths).to(dtype)
        centres = self.centres(levels)
        return levels.sub_(centres[:, None]).mul_(gain_factors(codes["gains"], dtype)[:, :, None])

    def empty(self) -> BitCoefficients:
        """A store of the same kind without tokens."""
        return BitCoefficients(self.widths, self.weights)

    def centres(self, like: Tensor) -> Tensor:
        """The middle of every direction's levels, ``[rank]``.

        Args:
            like: a tensor with the dtype and device.
        """
        return _kept(_centres, self.widths, like.dtype, like.device)

    def scores(self, rows: Tensor, shift: Tensor) -> Tensor:
        """``rows c + shift``: levels are read as they are, and their middles are taken off the products."""
        gains = gain_factors(self.codes["gains"], rows.dtype)[:, :, None]
        return (rows @ unpacked(self.codes, self.widths).to(rows.dtype) - self._along(rows)) * gains + shift

    def tile_scores(self, rows: Tensor, shift: Tensor, tokens: int) -> Tensor:
        """As :meth:`Coefficients.tile_scores`, likewise."""
        levels = in_tiles(unpacked(self.codes, self.widths), tokens).to(rows.dtype)
        gains = in_tiles(gain_factors(self.codes["gains"], rows.dtype)[:, :, None], tokens)
        return torch.addcmul(shift, rows @ levels - self._along(rows), gains)

    def mixed(self, weights: Tensor) -> Tensor:
        """``weights c^T``, likewise; in half precision levels are about zero, since sums with their middles cancel."""
        if weights.dtype in (torch.float16, torch.bfloat16):
            return super().mixed(weights)
        weights = weights * gain_factors(self.codes["gains"], weights.dtype)[:, :, None]
        levels = unpacked(self.codes, self.widths).to(weights.dtype)
        return weights @ levels.mT - weights.sum(-1, keepdim=True) * self.centres(weights)

    def over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """As :meth:`Coefficients.over_batch`; weights that serve the whole batch stay."""
        super().over_batch(change)
        if len(self.weights) > 1:
            self.weights = change(self.weights)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of everything that is stored."""
        yield "weights", self.weights
        yield from super().tensors()

    def _along(self, rows: Tensor) -> Tensor:
        return (rows @ self.centres(rows))[..., None]

    def _encode(self, values: Tensor) -> dict[str, Tensor]:
        trials = torch.arange(0, GAINS, COARSE, device=values.device).view(-1, 1, 1, 1)
        gains = self._best(values, trials.expand(-1, *values.shape[:2], values.shape[3]))
        apart = COARSE // 2
        while apart:
            around = torch.tensor([-apart, 0, apart], device=values.device).view(-1, 1, 1, 1)
            gains = self._best(values, (gains + around).clamp(0, GAINS - 1))
            apart //= 2
        levels = self._levels(values, gain_factors(gains, values.dtype))[1]
        return packed(levels.to(torch.uint8), self.widths) | {"gains": gains.to(torch.uint8)}

    def _best(self, values: Tensor, trials: Tensor) -> Tensor:
        """The gain of least error of every token, ``[batch, groups, tokens]``.

        Args:
            values: as in :meth:`encode`.
            trials: the gains that are tried, ``[trials, batch, groups, tokens]``.
        """
        factors = gain_factors(trials, values.dtype)
        scaled, levels = self._levels(values, factors)
        weights = self.weights.to(values)[:, :, None]
        errors = (weights @ scaled.sub_(levels).square_())[..., 0, :] * factors.square()
        return trials.gather(0, errors.argmin(0, keepdim=True))[0]

    def _levels(self, values: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Values in units of levels, and the closest levels."""
        centres = self.centres(values)[:, None]
        scaled = torch.addcmul(centres, values, factors.reciprocal()[..., None, :])
        return scaled, torch.minimum(scaled.round().clamp_min_(0), 2 * centres)


def gain_factors(gains: Tensor, dtype: torch.dtype) -> Tensor:
    """The gains of tokens.

    Args:
        gains: their integers, from zero on.
        dtype: dtype of the result.
    """
    return _kept(_gains, dtype, gains.device)[gains.int()]


@functools.cache
def _gains(dtype: torch.dtype, device: torch.device) -> Tensor:
    exponents = torch.arange(LEAST_GAIN, LEAST_GAIN + GAINS, dtype=torch.double) / PER_OCTAVE
    return torch.exp2(exponents).to(device, dtype)


@functools.lru_cache(maxsize=256)
def _centres(widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    middles = [(2**width - 1) / 2 for width, count in zip(WIDTHS, widths, strict=True) for _ in range(count)]
    return torch.tensor(middles, dtype=dtype, device=device)


def _kept(make: Any, *args: Any) -> Tensor:
    """What a cached function gives; a graph that is compiled makes it anew, and keeps it itself."""
    if torch.compiler.is_compiling():
        return cast(Tensor, make.__wrapped__(*args))
    with torch.inference_mode(False):  # others that use it may need gradients
        return cast(Tensor, make(*args))
