"""Every method keeps the same contract; a new one adds a row to METHOD_ROWS."""

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.compress.method import factored_cost
from lowrank_layers.layers import matrices_of

METHOD_ROWS = [
    pytest.param(lr.SVDMethod(), lambda: nn.Linear(12, 9), 9, id="svd-linear"),
    pytest.param(lr.SVDMethod(), lambda: nn.Linear(12, 9, bias=False), 9, id="svd-linear-nobias"),
    pytest.param(lr.SVDMethod(), lambda: nn.Conv2d(5, 8, 3, padding=1, stride=2), 8, id="svd-conv"),
    pytest.param(lr.SVDMethod(), lambda: nn.Embedding(40, 6, padding_idx=1), 6, id="svd-embedding"),
    pytest.param(lr.SVDMethod(), lambda: nn.Conv1d(5, 8, 3, padding=1, stride=2), 8, id="svd-conv1d"),
    pytest.param(lr.SVDMethod(), lambda: nn.Conv3d(5, 8, 2, padding=1), 8, id="svd-conv3d"),
    pytest.param(lr.SVDMethod(), lambda: nn.Conv2d(6, 8, 3, groups=2, dilation=2), 4, id="svd-groups"),
    pytest.param(lr.SVDMethod(), lambda: nn.ConvTranspose2d(5, 8, 3, stride=2, padding=1), 5, id="svd-transposed"),
    pytest.param(lr.SVDMethod(), lambda: nn.ConvTranspose1d(6, 8, 3, groups=2), 3, id="svd-transposed-groups"),
    pytest.param(lr.PivotMethod(), lambda: nn.Linear(12, 9), 9, id="pivot"),
    pytest.param(lr.PivotMethod(), lambda: nn.Linear(12, 19, bias=False), 12, id="pivot-nobias"),
    pytest.param(lr.PivotMethod(max_kernel=9), lambda: nn.Conv2d(5, 8, 3, padding=1, stride=2), 8, id="pivot-conv"),
    pytest.param(lr.PivotMethod(), lambda: nn.Conv2d(12, 9, 1), 9, id="pivot-pointwise"),
    pytest.param(lr.PivotMethod(max_kernel=3), lambda: nn.Conv1d(5, 8, 3, bias=False), 8, id="pivot-conv1d"),
    pytest.param(lr.PivotMethod(max_kernel=9), lambda: nn.Conv2d(6, 8, 3, groups=2, dilation=2), 4, id="pivot-groups"),
    pytest.param(lr.SpatialMethod(), lambda: nn.Conv2d(5, 8, 3, padding=1), 15, id="spatial"),
    pytest.param(lr.SpatialMethod(), lambda: nn.Conv2d(6, 8, (5, 3), groups=2), 12, id="spatial-groups"),
    pytest.param(lr.SpatialMethod(), lambda: nn.Conv2d(5, 5, 5, groups=5), 5, id="spatial-depthwise"),
    pytest.param(lr.TuckerMethod(), lambda: nn.Conv2d(5, 8, 3, padding=1), (8, 5), id="tucker"),
    pytest.param(lr.TuckerMethod(), lambda: nn.Conv1d(5, 8, 5, padding=1), (8, 5), id="tucker-conv1d"),
    pytest.param(lr.TuckerMethod(), lambda: nn.Conv2d(8, 8, 3, groups=2), (4, 4), id="tucker-groups"),
    pytest.param(lr.CPMethod(), lambda: nn.Conv2d(5, 8, 3, padding=1, bias=False), 45, id="cp"),
    pytest.param(lr.CPMethod(), lambda: nn.Conv3d(5, 8, 2), 40, id="cp-conv3d"),
    pytest.param(lr.TensorizedLinearMethod(steps=6), lambda: nn.Linear(12, 9), 1000, id="tensorized-linear"),
    pytest.param(
        lr.TensorizedLinearMethod(steps=6), lambda: nn.Linear(12, 9, bias=False), 1000, id="tensorized-linear-nobias"
    ),
    pytest.param(lr.TensorizedMethod(min_rows=30), lambda: nn.Embedding(40, 6), 1000, id="tensorized"),
    pytest.param(
        lr.TensorizedMethod(min_rows=30),
        lambda: nn.Embedding(40, 12, padding_idx=1),
        (1000, 1000),
        id="tensorized-padded",
    ),
]
ids = {"argnames": ("method", "make", "full"), "argvalues": METHOD_ROWS}


def batches_for(layer):
    torch.manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return [torch.randint(0, 40, (30, 7)) for _ in range(3)]
    channels = getattr(layer, "in_channels", 12)
    shape = (channels, *[7] * len(getattr(layer, "kernel_size", ())))
    mix = torch.randn(shape[0], shape[0]) / 2
    return [torch.einsum("nc...,cd->nd...", torch.randn(64, *shape) + 0.5, mix) for _ in range(3)]


@functools.cache
def calibrated(make):
    """A layer, its statistics and the batches that they are of: once for all tests, which leave the layer as it was."""
    torch.manual_seed(0)
    layer = make()
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4))
    data = batches_for(layer)
    with torch.no_grad():
        model(data[0])
    return layer, lr.calibrate(model, data, loss=lr.SampledCrossEntropy())["0"], data


def weighted_error(problem, matrix):
    root = problem.outputs.root.times(torch.eye(len(problem.weight), dtype=torch.float64))
    moment = problem.inputs.matrix
    moment = moment.diag() if moment.ndim == 1 else moment
    error = root @ (problem.weight - matrix.double())
    return 0.5 * problem.scale * float(((error @ moment) * error).sum())


def test_every_registered_method_has_a_row():
    assert {type(m) for m in lr.METHODS.values()} == {type(row.values[0]) for row in METHOD_ROWS}


@pytest.mark.parametrize(**ids)
@pytest.mark.parametrize("with_stats", [False, True])
def test_full_rank_is_the_dense_layer(method, make, full, with_stats):
    layer, stats, data = calibrated(make)
    built = method.build(lr.Candidate(layer, stats if with_stats else None), full)
    expected = layer(data[0])
    assert torch.dist(built(data[0]), expected) <= 2e-5 * expected.norm()


@pytest.mark.parametrize(**ids)
@pytest.mark.parametrize("with_stats", [False, True])
def test_options_cost_what_is_built(method, make, full, with_stats):
    layer, stats, _ = calibrated(make)
    known = stats if with_stats else None
    candidate = lr.Candidate(layer, known)
    options = method.options(candidate)
    assert options
    for option in options[:: max(1, len(options) // 4)]:
        built = method.build(candidate, option.rank)
        assert option.cost == lr.CountedCost().cost(built, known) == factored_cost(method, candidate, option.rank)
        assert option.cost.params == sum(p.numel() for p in built.parameters())
        assert option.cost.params < sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(**ids)
def test_the_estimate_is_the_weighted_error_of_what_is_built(method, make, full):
    """``1/2 P tr(G E C E^T)`` of the built layer's error ``E``, with the damped moments of the estimate."""
    layer, stats, _ = calibrated(make)
    candidate = lr.Candidate(layer, stats)
    for option in method.options(candidate)[::3]:
        built = method.build(candidate, option.rank).to_dense()
        measured = sum(map(weighted_error, candidate.problems, matrices_of(built)))
        # Tucker refines its input basis for the rank that is built, and can only do better than its estimate
        slack = 1.5 if isinstance(method, lr.TuckerMethod) else 1.0
        assert measured <= option.loss_increase * 1.001 * slack + 1e-6 * candidate.energy


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 9), lambda: nn.Embedding(40, 6)], ids=["linear", "embedding"])
def test_the_loss_of_the_best_pair_is_the_tail(make):
    layer, stats, _ = calibrated(make)
    (problem,) = lr.Candidate(layer, stats).problems
    tails = problem.tails
    for rank in (1, 3, 5):
        up, down = problem.pair(rank)
        assert problem.loss(up @ down) == pytest.approx(float(tails[rank]), rel=1e-8)
    assert problem.loss(torch.zeros_like(problem.weight)) == pytest.approx(problem.energy, rel=1e-10)


@pytest.mark.parametrize(**ids)
def test_weighting_lowers_the_error_of_the_outputs(method, make, full):
    layer, stats, data = calibrated(make)
    candidate = lr.Candidate(layer, replace(stats, gradients=None))
    options = method.options(candidate)
    rank = options[len(options) // 3].rank
    plain, weighted = method.build(lr.Candidate(layer), rank), method.build(candidate, rank)
    target = layer(data[0])
    assert torch.dist(weighted(data[0]), target) < torch.dist(plain(data[0]), target)


@pytest.mark.parametrize(**ids)
def test_more_rank_never_costs_more_loss(method, make, full):
    layer, stats, _ = calibrated(make)
    options = method.options(lr.Candidate(layer, stats))
    if isinstance(method, lr.TuckerMethod):
        options = [o for o in options if o.rank[1] == options[-1].rank[1]]
    losses = [o.loss_increase for o in options]
    slack = 0.02 * losses[0] if isinstance(method, lr.CPMethod) else 1e-9 * losses[0]  # ALS finds local optima
    assert all(b <= a + slack for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize(**ids)
def test_options_do_not_depend_on_what_is_cached(method, make, full):
    layer, stats, _ = calibrated(make)
    candidate = lr.Candidate(layer, stats)
    first = method.options(candidate)
    assert method.options(candidate) == first
    candidate.release()
    assert method.options(candidate) == first


@pytest.mark.parametrize(**ids)
def test_the_source_layer_is_left_as_it_was(method, make, full):
    layer, stats, _ = calibrated(make)
    before = copy.deepcopy(layer.state_dict())
    candidate = lr.Candidate(layer, stats)
    method.build(candidate, method.options(candidate)[0].rank)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
