"""The compiled functions give the products of definition, and stand back where they do not serve."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache import decode_kernel
from lowrank_layers.kv_cache.bit_allocation import WIDTHS
from lowrank_layers.kv_cache.bit_coefficients import GAINS, BitCoefficients, packed
from lowrank_layers.kv_cache.coefficients import FloatCoefficients
from lowrank_layers.kv_cache.compressed_tokens import HeadGroups
from lowrank_layers.kv_cache.subspace import Subspace
from lowrank_layers.kv_cache.tile_frame import TileFrame

SIZE, OFFSET = 16, 5
ROTATIONS = {
    "halves": lr.Rotation.of(SIZE),
    "interleaved": lr.Rotation.of(SIZE, interleaved=True),
    "part of a head": lr.Rotation.of(8, start=4),
}
SHAPES = {
    "whole tiles": (1, 1, 1, 3, 3, 96, (3, 6, 8, 16)),
    "one token": (1, 1, 1, 1, 1, 1, (1, 2, 4, 0)),
    "tokens left over, batch": (2, 1, 1, 2, 2, 77, (5, 10, 4, 8)),
    "groups and bases of their own": (2, 3, 2, 1, 5, 40, (2, 0, 4, 0)),
    "one width, many rows": (1, 1, 1, 2, 32, 50, (0, 0, 24, 0)),
    "more tokens than stay in the cache": (1, 2, 1, 1, 2, 2500, (1, 2, 4, 8)),
}
"""Batch, groups, batch of the bases, heads per group, rows per head, tokens, widths."""


def _group(batch, groups, bases, heads, tokens, widths, rotation):
    rank, width = sum(widths), heads * SIZE
    levels = [
        torch.randint(0, 2**bits, (batch, groups, count, tokens), dtype=torch.uint8)
        for bits, count in zip(WIDTHS, widths, strict=True)
    ]
    codes = packed(torch.cat(levels, 2), widths)
    codes["gains"] = torch.randint(0, GAINS, (batch, groups, tokens), dtype=torch.uint8)
    subspace = Subspace(
        torch.randint(-127, 128, (bases, groups, width, rank), dtype=torch.int8),
        torch.randn(bases, groups, width),
        torch.rand(bases, groups, rank) / 127,
        frame=None if rotation is None else TileFrame(rotation, SIZE),
    )
    return HeadGroups(slice(None), SIZE, subspace, BitCoefficients(widths, torch.ones(1, groups, rank), codes))


@pytest.fixture(autouse=True)
def _seed():
    if decode_kernel.library() is None:
        pytest.skip("needs Linux and a C++ compiler")
    torch.manual_seed(0)


@pytest.mark.parametrize(("rotation", "shape"), list(product(ROTATIONS, SHAPES)))
def test_scores_are_products_with_the_rotated_keys(rotation, shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    rotation = ROTATIONS[rotation]
    group = _group(batch, groups, bases, heads, tokens, widths, rotation)
    rows = torch.randn(batch, groups * heads, count, SIZE)
    positions = torch.arange(OFFSET, OFFSET + tokens)
    keys = rotation.turn(group.rebuilt(0, tokens, torch.float64), positions)
    assert decode_kernel.applies(rows, group.subspace, group.coefficients)
    found = group.tile_scores(rows, rotation.tile_waves(OFFSET, tokens))
    # angles are rounded in fp32, and so is the sum over the entries and the directions
    rounding = 2.0**-24 * (positions[-1] + 4 * (SIZE + sum(widths)))
    bound = rounding * rows.norm(dim=-1, keepdim=True) * (keys.norm(dim=-1) + _terms(group))[:, :, None]
    assert ((found - rows.double() @ keys.mT).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_are_weighted_sums_of_the_values(shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    group = _group(batch, groups, bases, heads, tokens, widths, None)
    # the weights of the tokens of one segment of several
    weights = torch.rand(batch, groups * heads, count, tokens + 7)[..., 3 : 3 + tokens]
    values = group.rebuilt(0, tokens, torch.float64)
    assert decode_kernel.applies(weights, group.subspace, group.coefficients)
    found = group.mixed(weights)
    rounding = 2.0**-24 * (tokens + 4 * sum(widths))
    bound = rounding * (weights.double() @ (values.norm(dim=-1) + _terms(group))[..., None])
    assert ((found - weights.double() @ values).abs() <= bound).all()


def _terms(group):
    """Bounds what cancels in the entries of a token: the norms of the terms of ``mean + basis c``."""
    columns = group.subspace.columns(torch.float64).norm(dim=2)[..., None]
    held = group.coefficients.read(0, group.coefficients.tokens, torch.float64).abs()
    terms = (columns * held).sum(2) + group.subspace.mean.double().norm(dim=2)[..., None]
    heads = group.subspace.mean.shape[2] // SIZE
    return terms.repeat_interleave(heads, 1)


def test_the_number_of_threads_does_not_matter():
    group = _group(1, 1, 1, 2, 3000, (2, 4, 8, 8), None)
    weights, before = torch.rand(1, 2, 2, 3000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(group.mixed(weights))
    finally:
        torch.set_num_threads(before)
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()
    assert (found[2] - found[0]).norm() <= 1e-5 * found[0].norm()


def test_where_it_does_not_serve():
    group = _group(1, 1, 1, 2, 40, (2, 4, 8, 8), None)
    rows = torch.randn(1, 2, 1, SIZE)
    serves = decode_kernel.applies
    assert serves(rows, group.subspace, group.coefficients)
    assert not serves(rows.double(), group.subspace, group.coefficients)
    assert not serves(rows.expand(1, 2, decode_kernel.MOST_ROWS + 1, SIZE), group.subspace, group.coefficients)
    assert not serves(rows, group.subspace, FloatCoefficients(torch.float32))
    assert not serves(torch.randn(1, 2, 1, SIZE, requires_grad=True), group.subspace, group.coefficients)
    assert not serves(rows.to("meta"), group.subspace, group.coefficients)


def test_gradients_go_through_operations_of_torch():
    rotation = ROTATIONS["halves"]
    group = _group(1, 1, 1, 2, 40, (2, 4, 8, 8), rotation)
    rows = torch.randn(1, 2, 1, SIZE, requires_grad=True)
    waves = rotation.tile_waves(OFFSET, 40)
    scores = group.tile_scores(rows, waves)
    scores.sum().backward()
    keys = rotation.turn(group.rebuilt(0, 40, torch.float32), torch.arange(OFFSET, OFFSET + 40))
    torch.testing.assert_close(rows.grad, keys.sum(2, keepdim=True), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(group.tile_scores(rows, waves), scores, rtol=1e-4, atol=1e-4)
