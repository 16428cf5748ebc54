"""The first fit of transform coding: from old tokens to directions, their bits, and codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .bit_allocation import allocate_bits, distortion
from .bit_coefficients import BitCoefficients
from .bit_subspace import bit_subspaces
from .compressed_tokens import CompressedTokens, HeadGroups, Heads, grouped
from .leaving_tokens import LeavingTokens
from .quantizers import Directions, Widths
from .subspace import Scatter, Subspace
from .tile_frame import TileFrame
from .transform import Transform

KEY_ERROR_WEIGHT = 2.0
"""Weight of the relative error of keys, where that of values has one: measured on a trained Llama."""


LONG = 16
"""Tokens per number of a row from which on a basis of their own may be worth its bytes."""
LOOKED_AT = 512
"""Number of tokens by which the error of a first fit is judged."""


def fitted_transform(
    x: Tensor,
    heads: int,
    frame: TileFrame | None,
    keep: Tensor | None = None,
    least: int = 1,
    *,
    values: bool,
    metric: Tensor | None = None,
) -> Transform:
    """The transform of the tokens themselves.

    Values are not centred: those of attention sinks are small, and must stay small.

    Args:
        x: keys (without their rotation) or values, ``[batch, heads, tokens, size]`` in fp32.
        heads: number of heads of a group.
        frame: the frame in which keys are stored.
        keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        least: rows of the batch with fewer tokens that count get the transform of the whole batch.
        values: whether these are values.
        metric: the metric of their errors; ``None`` is the identity.
    """
    scatter = Scatter.of(grouped(x, heads), frame, centre=not values, keep=keep).pooled(least)
    return Transform.fit(scatter.mean, scatter.covariance(), metric)


def comparable(transform: Transform, *, values: bool) -> list[Tensor]:
    """The variances of every group of heads, in units in which those of keys, values and layers compare.

    With a metric they are nats. Without one they are parts of the energy.

    Args:
        transform: the directions.
        values: whether they are those of values.
    """
    found = transform.variances.mean(0)
    if transform.metric is None:
        found = found / found.sum().clamp_min(1e-30) * (1.0 if values else KEY_ERROR_WEIGHT)
    return list(found)


@dataclass(frozen=True, eq=False)
class BitFit:
    """How the keys, or the values, of a layer are coded.

    Args:
        transform: their directions.
        widths: the numbers of directions with each of ``WIDTHS`` bits, for every group of heads.
        values: whether these are values.
        frame: the frame in which keys are stored; ``None`` is their own.
        shared: whether the transform is the model's, and not that of some tokens.
        made: subspaces of the model that are stored already; ``None`` makes them.
        refresh: tokens that are many, or lose more than this many times what the transform's own distribution would
            lose, get directions of their own where they lose less with them in as many bytes; ``None`` leaves them
            those of the model.
    """

    transform: Transform
    widths: Sequence[Widths]
    values: bool = False
    frame: TileFrame | None = None
    shared: bool = False
    made: Sequence[tuple[Subspace, BitCoefficients]] | None = None
    refresh: float | None = None

    def __call__(self, tokens: LeavingTokens, keep: Tensor | None = None, least: int = 1) -> CompressedTokens:
        """Codes the first old tokens.

        Args:
            tokens: keys or values.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
            least: rows of the batch with fewer tokens that count get a transform of the whole batch.
        """
        found = self._coded(tokens, keep)
        if not self.shared or self.refresh is None:
            return found
        unlike = found.discarded > self.refresh * self._expected() + 1e-4
        if not unlike and tokens.exact.shape[2] < LONG * self.transform.basis.shape[2]:
            return found
        own = self._of_tokens(tokens.plain, keep, least)._coded(tokens, keep)
        return own if own.discarded < found.discarded else found

    def _coded(self, tokens: LeavingTokens, keep: Tensor | None) -> CompressedTokens:
        _, heads, count, size = tokens.exact.shape
        groups = self.transform.mean.shape[1]
        together = heads // groups
        # padding comes first
        start = max(0, count - LOOKED_AT) // (2 if keep is None else 1)
        looked_at = slice(start, min(start + LOOKED_AT, count))
        parts, discarded = [], 0.0
        made = self.made or bit_subspaces(
            self.transform.to(tokens.exact.device), self.widths, self.frame, shared=self.shared
        )
        for group, (subspace, empty) in enumerate(made):
            which: Heads = slice(None) if groups == 1 else list(range(group * together, (group + 1) * together))
            part = HeadGroups(which, size, subspace, empty.empty())
            lost, whole = part.add(tokens.of_heads(which), looked_at, keep)
            discarded = max(discarded, lost / max(whole, 1e-30))
            parts.append(part)
        return CompressedTokens(parts, discarded)

    def _expected(self) -> float:
        """The part of the energy that is lost on tokens of the transform's own distribution."""
        variances = self.transform.variances.mean(0)
        lost = [distortion(v, widths) for v, widths in zip(variances, self.widths, strict=True)]
        return max(left / max(float(v.sum()), 1e-30) for left, v in zip(lost, variances, strict=True))

    def _of_tokens(self, x: Tensor, keep: Tensor | None, least: int) -> BitFit:
        """The same with the directions of these tokens, whose bases take some of the bits."""
        width, together = self.transform.basis.shape[2], x.shape[1] // self.transform.mean.shape[1]
        metric = self.transform.metric
        own = fitted_transform(x, together, self.frame, keep, least, values=self.values, metric=metric)
        # bits per token: a mean, and per direction a column in int8, its scale and its weight
        spent = sum(Directions(v).cost(each) for v, each in zip(own.variances.mean(0), self.widths, strict=True))
        left = spent - 32 * width * len(self.widths) / x.shape[2]
        directions = [Directions(v, first=8 * (width + 8) / x.shape[2]) for v in own.variances.mean(0)]
        return replace(self, transform=own, widths=allocate_bits(directions, left), shared=False, made=None)


@dataclass(frozen=True, eq=False)
class BitPlan:
    """Directions and bits of the keys and values of one layer.

    Args:
        transforms: the directions of keys and of values.
        widths: the numbers of directions with each of ``WIDTHS`` bits, for keys and for values, by group of heads.
        shared: whether the transforms are the model's, and not those of some tokens.
    """

    transforms: tuple[Transform, Transform]
    widths: Sequence[Sequence[Widths]]
    shared: bool = False

    def fits(self, frame: TileFrame | None, refresh: float | None, device: torch.device) -> tuple[BitFit, BitFit]:
        """How keys and values are coded.

        Args:
            frame: the frame in which keys are stored.
            refresh: as in :class:`BitFit`.
            device: where keys and values are.
        """
        found = []
        for side, (each, widths) in enumerate(zip(self.transforms, self.widths, strict=True)):
            own = None if side else frame
            made = self._stored(side, own, device) if self.shared else None
            found.append(BitFit(each, widths, bool(side), own, self.shared, made, refresh))
        return found[0], found[1]

    def _stored(
        self, side: int, frame: TileFrame | None, device: torch.device
    ) -> Sequence[tuple[Subspace, BitCoefficients]]:
        """What all sequences share, stored once per device."""
        if (side, device) not in self._kept:
            with torch.inference_mode(False):  # others that use it may need gradients
                transform = self.transforms[side].to(device)
                self._kept[side, device] = bit_subspaces(transform, self.widths[side], frame, shared=True)
        return self._kept[side, device]

    @cached_property
    def _kept(self) -> dict[tuple[int, torch.device], Sequence[tuple[Subspace, BitCoefficients]]]:
        return {}


def plan_bits(transforms: Sequence[tuple[Transform, Transform]], bits: float, *, shared: bool = False) -> list[BitPlan]:
    """Gives a mean number of bits per entry to the directions of all layers, with one water level.

    Args:
        transforms: the directions of keys and of values, by layer.
        bits: mean number of bits per entry.
        shared: whether the transforms are the model's, and not those of some tokens.
    """
    sides = [comparable(side, values=bool(index)) for pair in transforms for index, side in enumerate(pair)]
    entries = sum(len(variances) for side in sides for variances in side)
    found = iter(allocate_bits([Directions(v) for side in sides for v in side], bits * entries))
    widths = [[next(found) for _ in side] for side in sides]
    pairs = zip(transforms, widths[0::2], widths[1::2], strict=True)
    return [BitPlan(pair, (keys, values), shared) for pair, keys, values in pairs]
