"""The transform of transform coding, and keys in the frame of their tile."""

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache.rope import TILE_FRAME
from lowrank_layers.kv_cache.tile_frame import TileFrame
from lowrank_layers.kv_cache.transform import Transform


def positive(size, batch=1):
    x = torch.randn(batch, 1, size, size, dtype=torch.double)
    return x @ x.mT


def test_directions_are_uncorrelated_and_orthonormal_in_the_metric():
    torch.manual_seed(0)
    covariance, metric = positive(12), positive(12)
    made = Transform.fit(torch.zeros(1, 1, 12), covariance, metric)
    inner = made.basis.mT @ made.metric @ made.basis
    torch.testing.assert_close(inner, torch.eye(12, dtype=torch.double)[None, None], atol=1e-8, rtol=0)
    dual = made.basis.mT @ made.metric
    torch.testing.assert_close(
        dual @ covariance @ dual.mT, made.variances[..., None] * torch.eye(12), atol=1e-6, rtol=0
    )
    assert bool((made.variances.diff() <= 0).all())


@pytest.mark.parametrize("weighted", [True, False])
def test_leaving_out_directions_costs_their_variances_and_no_subspace_costs_less(weighted):
    torch.manual_seed(1)
    covariance, metric = positive(10), positive(10) if weighted else None
    made = Transform.fit(torch.zeros(1, 1, 10), covariance, metric)
    held = torch.eye(10, dtype=torch.double) if made.metric is None else made.metric

    def cost(basis):
        dual = basis.mT @ held
        left = torch.eye(10) - basis @ torch.linalg.solve(dual @ basis, dual)
        return float((left @ covariance @ left.mT @ held).diagonal(dim1=-2, dim2=-1).sum())

    best = cost(made.basis[..., :4])
    assert best == pytest.approx(float(made.variances[..., 4:].sum()), rel=1e-6)
    assert all(cost(torch.randn(1, 1, 10, 4, dtype=torch.double)) > best for _ in range(20))


@pytest.mark.parametrize("rotation", [lr.Rotation.of(8), lr.Rotation(torch.rand(3), interleaved=True, start=1)])
@pytest.mark.parametrize("start", [0, 5])
def test_into_the_frame_of_a_tile_and_back(rotation, start):
    frame, rows = TileFrame(rotation, 8), torch.randn(2, 1, 90, 16)
    inside = frame.into(rows, start)
    torch.testing.assert_close(frame.out_of(inside, start), rows, atol=1e-5, rtol=1e-5)
    # rotated on to the centre of its tile, a key is where its own position rotates it
    positions = torch.arange(start, start + 90)
    centres = positions // TILE_FRAME * TILE_FRAME + (TILE_FRAME - 1) / 2
    keys, framed = (x.unflatten(-1, (2, 8)).transpose(2, 3) for x in (rows, inside))
    torch.testing.assert_close(rotation.turn(framed, centres), rotation.turn(keys, positions), atol=1e-4, rtol=1e-4)


def test_the_average_over_a_tile_is_that_of_its_offsets():
    frame, second = TileFrame(lr.Rotation.of(8), 8), positive(16).float()
    rows = torch.eye(16)[None, :, None].expand(1, 16, TILE_FRAME, 16)
    turned = frame.into(rows, 0)[0].transpose(0, 1)  # for every offset, R(d) e_i as its row i
    expected = (turned.mT @ second[0, 0] @ turned).mean(0)
    torch.testing.assert_close(frame.average(second)[0, 0], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rotation", [lr.Rotation.of(8), lr.Rotation(torch.rand(3), interleaved=True, start=1)])
def test_a_query_turned_back_by_every_position_in_one_product(rotation):
    query, basis, positions = torch.randn(3, 8), torch.randn(8, 5), torch.tensor([0.0, 3.5, 100.0])
    found = rotation.waves(positions) @ rotation.turned_back(query, basis)
    expected = rotation.turn(query[:, None].expand(3, 3, 8), -positions) @ basis
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
