"""Keys and values as packed levels of random numbers, and bounds for what is computed with them."""

import torch
import torch.nn.functional as F

import lowrank_layers as lr
from lowrank_layers.kv_cache.bit_coefficients import GAINS, LEAST_GAIN, PER_OCTAVE, BitCoefficients
from lowrank_layers.kv_cache.bit_planes import packed
from lowrank_layers.kv_cache.compressed_tokens import HeadGroups
from lowrank_layers.kv_cache.quantizers import WIDTHS
from lowrank_layers.kv_cache.subspace import Subspace
from lowrank_layers.kv_cache.tile_frame import TileFrame

SIZE, OFFSET = 16, 5
ROTATIONS = {
    "halves": lr.Rotation.of(SIZE),
    "interleaved": lr.Rotation.of(SIZE, interleaved=True),
    "part of a head": lr.Rotation.of(8, start=4),
}
SHAPES = {
    "whole tiles": (1, 1, 1, 3, 3, 96, (3, 6, 8, 8, 16)),
    "one token": (1, 1, 1, 1, 1, 1, (1, 2, 0, 4, 0)),
    "tokens left over, batch": (2, 1, 1, 2, 2, 77, (5, 10, 0, 4, 8)),
    "groups and bases of their own": (2, 3, 2, 1, 5, 40, (2, 0, 16, 4, 0)),
    "one width, many rows": (1, 1, 1, 2, 32, 50, (0, 0, 0, 24, 0)),
    "three bits, many rows": (1, 1, 1, 2, 32, 50, (0, 0, 24, 0, 0)),
    "no direction": (1, 1, 1, 2, 1, 40, (0, 0, 0, 0, 0)),
    "more tokens than stay in the cache": (1, 2, 1, 1, 2, 2500, (1, 2, 8, 4, 8)),
}
"""Batch, groups, batch of the bases, heads per group, rows per head, tokens, widths."""


def group_of(batch, groups, bases, heads, tokens, widths, rotation, device="cpu"):
    """Groups of heads with random bases, means and levels."""
    rank, width = sum(widths), heads * SIZE
    levels = [
        torch.randint(0, 2**bits, (batch, groups, count, tokens), dtype=torch.uint8)
        for bits, count in zip(WIDTHS, widths, strict=True)
    ]
    codes = packed(torch.cat(levels, 2), widths)
    codes["gains"] = torch.randint(0, GAINS, (batch, groups, tokens), dtype=torch.uint8)
    subspace = Subspace(
        torch.randint(-127, 128, (bases, groups, width, rank), dtype=torch.int8).to(device),
        torch.randn(bases, groups, width).to(device),
        (torch.rand(bases, groups, rank) / 127).to(device),
        frame=None if rotation is None else TileFrame(rotation.to(torch.device(device)), SIZE),
    )
    codes = {name: code.to(device) for name, code in codes.items()}
    return HeadGroups(slice(None), SIZE, subspace, BitCoefficients(widths, torch.ones(1, groups, rank), codes))


def exact_scores(group, rows, rotation):
    """The products of rows with the rotated keys in fp64."""
    tokens = group.coefficients.tokens
    keys = rotation.turn(
        group.rebuilt(0, tokens, torch.float64), torch.arange(OFFSET, OFFSET + tokens, device=rows.device)
    )
    return rows.double() @ keys.mT


def score_bound(group, rows):
    """What rounding every number in fp32 costs the scores at most."""
    tokens = group.coefficients.tokens
    # angles are rounded, and so is the sum over the entries and the directions
    rounding = 2.0**-24 * (OFFSET + tokens - 1 + 4 * (SIZE + group.subspace.basis.shape[3]))
    return rounding * score_terms(group, rows)


def integer_bound(group, rows):
    """What 16 bits for the entries of queries and for their coefficients cost the scores at most."""
    most = rows.double().norm(dim=-1, keepdim=True) * 2.0**-15
    columns = F.pad(group.subspace.columns(torch.float64).norm(dim=2), (0, 1)).amax(-1, keepdim=True)
    columns = columns * (4 if group.coefficients.widths[2] else 1)  # the first bit of 3 counts four times as much
    highest = sum((2**bits - 1) * count for bits, count in zip(WIDTHS, group.coefficients.widths, strict=True))
    gains = 2 ** ((LEAST_GAIN + group.coefficients.codes["gains"].double()) / PER_OCTAVE)
    levels = (columns * highest * gains).repeat_interleave(rows.shape[1] // gains.shape[1], 1)
    # an entry that turns is at most sqrt(2) times the greatest, and is rounded by half a step
    return most * levels[:, :, None] + 2**-15 * group.size**0.5 * score_terms(group, rows)


def integer_bound_of_attention(kv, query):
    """What these 16 bits cost attention to a cache at most, by its compiled functions: none where nothing has bits."""
    group = kv.old[0].parts[0]
    if not isinstance(group.coefficients, BitCoefficients):
        return 0.0
    rows = query.unflatten(1, (len(kv.like()[0]), -1)).flatten(2, 3) * query.shape[-1] ** -0.5
    # scores that change by d change their softmax by at most 2 d in all
    return float(2 * integer_bound(group, rows).max() * kv.side(1).abs().max())


def score_terms(group, rows):
    """Bounds the sums of the absolute terms of the scores."""
    return rows.double().norm(dim=-1, keepdim=True) * _terms(group)[:, :, None]


def mixed_terms(group, weights):
    """Bounds the sums of the absolute terms of weighted values."""
    return weights.double() @ _terms(group)[..., None]


def mixed_bound(group, weights):
    """What rounding every number in fp32 costs weighted sums at most."""
    rounding = 2.0**-24 * (group.coefficients.tokens + 4 * group.subspace.basis.shape[3])
    return rounding * mixed_terms(group, weights)


def weight_bound(group, weights):
    """What 16 bits for the weights, times the gains of their tokens, cost weighted sums, with hardly any exception.

    A token's weight is off by what is rounded off, uniform within half a unit, less what the token before left: .41 of
    a unit in the mean square. Four times the root of the sum of squares is hardly ever exceeded.
    """
    tokens, per_head = group.coefficients.tokens, weights.shape[1] // group.coefficients.codes["gains"].shape[1]
    gains = 2 ** ((LEAST_GAIN + group.coefficients.codes["gains"].double()) / PER_OCTAVE)
    gains = gains.repeat_interleave(per_head, 1)
    means = group.subspace.mean.double().unflatten(2, (-1, group.size)).flatten(1, 2)[:, :, None]
    levels = (group.rebuilt(0, tokens, torch.float64) - means) / gains[..., None]
    unit = (weights.double().abs() * gains[:, :, None]).amax(-1, keepdim=True) / (2**15 - 2)
    return 4 * 0.41 * unit * levels.norm(dim=2)[:, :, None]


def weight_bound_of_attention(kv, query, scale):
    """What these 16 bits cost attention of one query per head to a cache at most."""
    group, keys = kv.old[1].parts[0], kv.side(0).double()
    rows = query.double().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    weights = (scale * rows @ keys.mT).softmax(-1)
    first = len(kv) - kv.recent[0].tokens - kv.compressed
    return weight_bound(group, weights[..., first : first + kv.compressed]).flatten(1, 2).unsqueeze(2)


def _terms(group):
    """Bounds the entries of a token and what cancels in them: its norm, and those of ``mean + basis c``'s terms."""
    tokens = group.coefficients.tokens
    columns = group.subspace.columns(torch.float64).norm(dim=2)[..., None]
    held = group.coefficients.read(0, tokens, torch.float64).abs()
    terms = (columns * held).sum(2) + group.subspace.mean.double().norm(dim=2)[..., None]
    heads = group.subspace.mean.shape[2] // group.size
    return group.rebuilt(0, tokens, torch.float64).norm(dim=-1) + terms.repeat_interleave(heads, 1)
