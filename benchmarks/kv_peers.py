"""Other ways to compress a key/value cache, as benchmarks.kv_real compares them.

Quantized tokens are held as they are read back, and their bytes are counted as they are packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr

from .kv_driver import OBSERVED, Driver, prefilled
from .kv_stores import Exact, Store

GROUP = 32
"""Numbers that share a scale and a zero point, both in fp16."""
ROOM = 512
FP8 = torch.float8_e4m3fn


class Simulated(Store):
    """Holds all tokens in one buffer, in which subclasses overwrite the ones that they quantize."""

    def __init__(self) -> None:
        self.length = 0
        self.buffers: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes what earlier steps left, appends tokens and returns all, these as they are."""
        if self.length:
            self.settle()
        start, self.length = self.length, self.length + keys.shape[2]
        for side, x in enumerate((keys, values)):
            if len(self.buffers) <= side or self.length > self.buffers[side].shape[2]:
                grown = x.new_zeros((*x.shape[:2], self.length + ROOM, x.shape[3]), dtype=torch.float32)
                if start:
                    grown[:, :, :start] = self.buffers[side][:, :, :start]
                self.buffers[side : side + 1] = [grown]
            self.buffers[side][:, :, start : self.length] = x
        return self.held(0), self.held(1)

    def held(self, side: int) -> Tensor:
        return self.buffers[side][:, :, : self.length]

    def settle(self) -> None:
        """Quantizes the tokens that are no longer recent."""

    def side_bits(self, side: int) -> float:
        """Bits of keys or values of all tokens and heads: here all exact, in bf16."""
        return 16.0 * self.held(side).numel()

    def nbytes(self) -> int:
        self.settle()
        return round((self.side_bits(0) + self.side_bits(1)) / 8)


class Float8(Simulated):
    """8-bit floating point (e4m3) with an fp16 scale per token and head; none exact."""

    done = 0

    def settle(self) -> None:
        for buffer in self.buffers:
            x = buffer[:, :, self.done : self.length]
            scale = (x.abs().amax(-1, keepdim=True) / torch.finfo(FP8).max).half().float().clamp_min(1e-7)
            x.copy_((x / scale).to(FP8).float() * scale)
        self.done = self.length

    def side_bits(self, side: int) -> float:
        x = self.held(side)
        return x.numel() * (8 + 16 / x.shape[3])


class Kivi(Simulated):
    """Few bits in KIVI's layout (Liu et al., 2024): keys per channel over groups of tokens, values per token."""

    def __init__(self, bits: int, recent: int = 32) -> None:
        super().__init__()
        self.bits, self.recent = bits, recent
        self.done = [0, 0]

    def settle(self) -> None:
        # keys leave in whole groups of tokens, values one token at a time
        for side, unit in ((0, GROUP), (1, 1)):
            old = self.length - self.recent - self.done[side]
            if old < unit:
                continue
            start, self.done[side] = self.done[side], self.done[side] + old // unit * unit
            x = self.buffers[side][:, :, start : self.done[side]]
            if side == 0:
                x.copy_(rounded(x.transpose(2, 3).unflatten(3, (-1, GROUP)), self.bits).flatten(3).transpose(2, 3))
            else:
                x.copy_(rounded(x.unflatten(3, (-1, GROUP)), self.bits).flatten(3))

    def side_bits(self, side: int) -> float:
        each = self.held(side)[:, :, 0].numel()
        return each * ((self.bits + 32 / GROUP) * self.done[side] + 16 * (self.length - self.done[side]))

    @staticmethod
    def ratio(bits: int, tokens: int, recent: int = 32) -> float:
        """How many times fewer bytes than bf16 so many tokens take; of the keys half a group more is exact."""
        exact = 2 * recent + GROUP / 2
        return 16 * 2 * tokens / ((bits + 32 / GROUP) * (2 * tokens - exact) + 16 * exact)


class Palu(Simulated):
    """As Palu (Chang et al., 2024): coefficients in bases from calibration, keys before RoPE; none exact.

    Args:
        bases: orthonormal directions of keys and of values, of all heads jointly, ``[heads * size, rank]``.
        rotation: the rotation of keys.
        bits: bits of a coefficient, with groups of ``GROUP`` coefficients of a token; ``None`` is fp16.
    """

    def __init__(self, bases: tuple[Tensor, Tensor], rotation: lr.Rotation, bits: int | None) -> None:
        super().__init__()
        self.bases, self.rotation, self.bits, self.done = bases, rotation, bits, 0

    def settle(self) -> None:
        if self.done == self.length:
            return
        positions = torch.arange(self.done, self.length, device=self.buffers[0].device)
        for side, basis in enumerate(self.bases):
            x = self.buffers[side][:, :, self.done : self.length]
            heads = x.shape[1]
            if side == 0:
                x.copy_(self.rotation.turn(x, -positions))
            coefficients = x.transpose(1, 2).flatten(2) @ basis
            if self.bits is None:
                coefficients = coefficients.half().float()
            else:
                padding = -coefficients.shape[-1] % GROUP
                groups = F.pad(coefficients, (0, padding), mode="replicate").unflatten(-1, (-1, GROUP))
                coefficients = rounded(groups, self.bits).flatten(-2)[..., : coefficients.shape[-1]]
            back = (coefficients @ basis.mT).unflatten(-1, (heads, -1)).transpose(1, 2)
            x.copy_(back if side else self.rotation.turn(back, positions))
        self.done = self.length

    def side_bits(self, side: int) -> float:
        return float(self.length * self.token_bits(self.bases[side].shape[1], self.bits))

    def shared_nbytes(self) -> int:
        return sum(2 * basis.numel() for basis in self.bases)

    @staticmethod
    def token_bits(rank: int, bits: int | None) -> int:
        """Bits of a token's coefficients with their scales, of keys or of values."""
        return 16 * rank if bits is None else bits * rank + 32 * -(-rank // GROUP)


class SnapKV(Exact):
    """Eviction by attention (Li et al., 2024): of the prompt, the tokens that its last queries look at are kept.

    Args:
        queries: the prompt's last queries, rotated; they are the window that is kept.
        kept: number of the prompt's tokens that are kept, per key/value head.
        kernel: tokens over which the attention is pooled.
    """

    def __init__(self, queries: Tensor, kept: int, kernel: int = 7) -> None:
        super().__init__()
        self.queries, self.picked, self.kernel = queries.float(), kept - queries.shape[2], kernel

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        is_prompt = self.kept is None
        seen = super().update(keys, values)
        if is_prompt and self.picked < keys.shape[2] - OBSERVED:
            last = self.queries.shape[2]
            old, recent = keys[:, :, :-last], torch.arange(keys.shape[2] - last, keys.shape[2], device=keys.device)
            rows = self.queries.unflatten(1, (keys.shape[1], -1))
            scores = rows @ keys.float().unsqueeze(2).mT * keys.shape[3] ** -0.5
            later = torch.ones(last, last, dtype=torch.bool, device=keys.device).triu(1)
            scores[..., -last:] = scores[..., -last:].masked_fill(later, -torch.inf)
            found = scores.softmax(-1)[..., : old.shape[2]].mean((2, 3))
            pooled = F.avg_pool1d(found, self.kernel, 1, self.kernel // 2)
            index = torch.cat([pooled.topk(self.picked, -1).indices, recent.expand(*keys.shape[:2], -1)], -1)
            index = index.sort(-1).values[..., None].expand(-1, -1, -1, keys.shape[3])
            self.kept = keys.gather(2, index), values.gather(2, index)
        return seen


def rounded(x: Tensor, bits: int) -> Tensor:
    """Quantizes groups along the last dimension, from their least to their greatest number, and reads them back."""
    low, high = (f(x, dim=-1, keepdim=True) for f in (torch.amin, torch.amax))
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@torch.no_grad()
def palu_bases(driver: Driver, windows: Sequence[Tensor], rotation: lr.Rotation) -> list[tuple[Tensor, Tensor]]:
    """All directions of each layer's keys and values before RoPE, by their share of the energy in these windows."""
    moments: dict[tuple[int, int], Tensor] = {}
    for window in windows:
        for layer, prompt in enumerate(prefilled(driver, window[None])):
            keys = rotation.turn(prompt.keys.float(), -torch.arange(len(window), device=prompt.keys.device))
            for side, x in enumerate((keys, prompt.values.float())):
                rows = x.transpose(1, 2).flatten(0, 1).flatten(1)
                moments[layer, side] = moments.get((layer, side), rows.new_zeros(())) + rows.mT @ rows
    found = {which: torch.linalg.eigh(moment)[1].flip(1) for which, moment in moments.items()}
    return [(found[layer, 0], found[layer, 1]) for layer in range(len(found) // 2)]
