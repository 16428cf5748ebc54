"""The compiled functions give the products of definition, and stand back where they do not serve."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowrank_layers.kv_cache import decode_kernel
from lowrank_layers.kv_cache.coefficients import FloatCoefficients
from lowrank_layers.kv_cache.compiled_functions import compiled_functions

from .packed import (
    OFFSET,
    ROTATIONS,
    SHAPES,
    SIZE,
    exact_scores,
    group_of,
    integer_bound,
    mixed_bound,
    score_bound,
    weight_bound,
)


@pytest.fixture(autouse=True)
def _seed():
    if compiled_functions() is None:
        pytest.skip("needs Linux and a C++ compiler")
    torch.manual_seed(0)


@pytest.mark.parametrize(("rotation", "shape"), list(product(ROTATIONS, SHAPES)))
def test_scores_are_products_with_the_rotated_keys(rotation, shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    rotation = ROTATIONS[rotation]
    group = group_of(batch, groups, bases, heads, tokens, widths, rotation)
    rows = torch.randn(batch, groups * heads, count, SIZE)
    assert decode_kernel.applies(rows, group.subspace, group.coefficients)
    found = group.tile_scores(rows, rotation.tile_waves(OFFSET, tokens))
    bound = score_bound(group, rows) + integer_bound(group, rows)
    assert ((found - exact_scores(group, rows, rotation)).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_are_weighted_sums_of_the_values(shape):
    batch, groups, bases, heads, count, tokens, widths = SHAPES[shape]
    group = group_of(batch, groups, bases, heads, tokens, widths, None)
    # the weights of the tokens of one segment of several
    weights = torch.rand(batch, groups * heads, count, tokens + 7)[..., 3 : 3 + tokens]
    values = group.rebuilt(0, tokens, torch.float64)
    assert decode_kernel.applies(weights, group.subspace, group.coefficients)
    found = group.mixed(weights)
    bound = mixed_bound(group, weights) + weight_bound(group, weights)
    assert ((found - weights.double() @ values).abs() <= bound).all()


@pytest.mark.parametrize("width", range(5))
def test_many_small_weights_are_not_lost_beside_a_great_one(width):
    group = group_of(1, 1, 1, 1, 1024, [8 * (k == width) for k in range(5)], None)
    codes = group.coefficients.codes
    for code in codes.values():
        code.copy_(code[..., :1].clone())  # all tokens alike: what is rounded off adds up
    weights = torch.full((1, 1, 1, 1024), 0.4 / (2**15 - 2))
    weights[..., 0] = 1.0
    value = group.rebuilt(0, 1, torch.float64)
    lost = weight_bound(group, weights) / 32 / 1.64  # of one token: the root of 1,024 is 32
    found = group.mixed(weights)
    # the errors of each of at most 16 lanes add up to a unit at most
    bound = 16 * lost + mixed_bound(group, weights)
    assert ((found - weights.double().sum() * value).abs() <= bound).all()
    # each of the others is less than half a unit, and would be lost
    assert (found - value).norm() > 100 * lost.norm()


def test_the_number_of_threads_does_not_matter():
    group = group_of(1, 1, 1, 2, 3000, (2, 4, 8, 8, 8), None)
    weights, before = torch.rand(1, 2, 2, 3000), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(group.mixed(weights))
    finally:
        torch.set_num_threads(before)
    bound = 2 * (mixed_bound(group, weights) + weight_bound(group, weights))
    for other in found[1:]:
        assert ((other - found[0]).abs() <= bound).all()


def test_where_it_does_not_serve():
    group = group_of(1, 1, 1, 2, 40, (2, 4, 8, 8, 8), None)
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
    group = group_of(1, 1, 1, 2, 40, (2, 4, 8, 8, 8), rotation)
    rows = torch.randn(1, 2, 1, SIZE, requires_grad=True)
    waves = rotation.tile_waves(OFFSET, 40)
    scores = group.tile_scores(rows, waves)
    scores.sum().backward()
    keys = rotation.turn(group.rebuilt(0, 40, torch.float32), torch.arange(OFFSET, OFFSET + 40))
    torch.testing.assert_close(rows.grad, keys.sum(2, keepdim=True), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        bound = 2 * score_bound(group, rows) + integer_bound(group, rows)
        assert ((group.tile_scores(rows, waves) - scores).abs() <= bound).all()
