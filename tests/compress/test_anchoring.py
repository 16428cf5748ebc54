"""How far layers follow the dense model, chosen on rows that are held out."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.calibrate.moments import sums
from lowrank_layers.compress.anchoring import BLENDS, CLEARLY, RIDGES, anchored
from lowrank_layers.compress.paired_moments import PairedMoments

DAMPING = lr.Damping(inputs=1e-3, outputs=0.1)
SHRUNK = lr.Damping(inputs=1e-3, outputs=0.1, input_shrinkage=0.3, output_shrinkage=0.4)


def shrunk(moment: Tensor, share: float, ridge: float) -> Tensor:
    diagonal = moment.diagonal()
    return (1 - share) * moment + torch.diag(share * diagonal + ridge * diagonal.mean())


def paired(x: Tensor, x_dense: Tensor, stats: lr.Statistics) -> PairedMoments:
    found = PairedMoments.before_any(stats[""].inputs)
    found.add(sums(x), sums(x, x_dense), len(x))
    return found


def setting(layer: nn.Linear, x: Tensor, x_dense: Tensor, held: int, loss):
    """Statistics behind a prefix that delivers ``x``, and the moments of the last rows."""
    stats = lr.calibrate(layer, [x_dense], loss=loss)
    whole = paired(x, x_dense, stats)
    cross = whole.cross - torch.outer(whole.target_mean, whole.inputs.mean)
    own = stats[""].changed(inputs=whole.inputs, cross=cross, target_mean=whole.target_mean)
    return own, paired(x[-held:], x_dense[-held:], stats)


def regression(x: Tensor, x_dense: Tensor, ridge: float, blend: float) -> Tensor:
    """``P`` of centred rows."""
    second = x.mT @ x / len(x)
    eye = torch.eye(len(second)).to(x)
    difference = (x_dense - x).mT @ x / len(x)
    return eye + blend * difference @ torch.linalg.inv(second + ridge * second.diagonal().mean() * eye)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("loss", [None, lr.SampledCrossEntropy()], ids=["inputs", "gradients"])
@pytest.mark.parametrize("noise", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("damping", [DAMPING, SHRUNK], ids=["ridges", "shrinkage"])
def test_the_choice_is_that_of_least_error_on_the_rows_held_out(damping, noise, loss, has_bias):
    """By the rows themselves: every ridge and blend is fitted to the first ones and scored on the others."""
    torch.manual_seed(1)
    layer = nn.Linear(14, 9, bias=has_bias).double()
    x_dense = torch.randn(60, 14).double() @ torch.randn(14, 14).double() / 4 + 0.5
    x = x_dense @ (torch.eye(14) + 0.1 * torch.randn(14, 14)).double() + noise * torch.randn(60, 14).double()
    stats, held = setting(layer, x, x_dense, 15, loss)
    found = anchored(layer, stats, held, damping, has_bias=has_bias)

    own, dense = (x - x.mean(0), x_dense - x_dense.mean(0)) if has_bias else (x, x_dense)
    metric = torch.eye(9).double()
    if loss is not None:
        metric = shrunk(stats.gradients, damping.output_shrinkage, damping.outputs)

    def error(matrix: Tensor) -> float:
        residual = (dense[-15:] - own[-15:] @ matrix.mT) @ layer.weight.detach().mT
        return float((residual @ metric * residual).sum())

    eye = torch.eye(14).double()
    gains = {
        choice: error(eye) - error(regression(own[:-15], dense[:-15], *choice))
        for choice in product((DAMPING.inputs, *RIDGES[1:]), BLENDS)
    }
    gains[DAMPING.inputs, 1.0] *= CLEARLY
    best = max(gains, key=gains.__getitem__)
    if gains[best] <= 0:
        assert found is None
        return
    assert found is not None
    matrix = regression(own, dense, *best)
    moment = own.mT @ own / len(own)
    cross = found.cross if has_bias else found.cross + torch.outer(found.target_mean, found.inputs.mean)
    damped = shrunk(moment, damping.input_shrinkage, damping.inputs)
    added = damped - (1 - damping.input_shrinkage) * moment
    assert torch.allclose((1 - damping.input_shrinkage) * cross + added, matrix @ damped, rtol=1e-6, atol=1e-8)
    problem = lr.Candidate(layer, found.changed(free_bias=False), damping=damping).problems[0]
    assert torch.allclose(problem.full, layer.weight @ matrix, rtol=1e-6, atol=1e-8)


def test_a_difference_that_cannot_be_predicted_is_hardly_followed():
    """The dense model's inputs are those behind the prefix plus noise: what a regression finds there is chance."""
    followed = []
    for seed in range(10):
        torch.manual_seed(seed)
        layer, x = nn.Linear(30, 10).double(), torch.randn(80, 30).double()
        stats, held = setting(layer, x, x + torch.randn(80, 30), 20, None)
        found = anchored(layer, stats, held, DAMPING, has_bias=True)
        own = stats.inputs.covariance()
        part = 0.0 if found is None else torch.dist(found.cross, own) / torch.dist(stats.cross, own)
        followed.append(float(part))
    assert sum(followed) / len(followed) < 0.2


def test_groups_are_chosen_for_one_by_one():
    """Of a grouped convolution: the first group's inputs are moved by a map, the other's by noise."""
    torch.manual_seed(0)
    conv = nn.Conv1d(40, 8, 1, groups=2).double()
    x = torch.randn(60, 40, 1).double()
    dense = x.clone()
    dense[:, :20, 0] = x[:, :20, 0] @ (torch.eye(20) + 0.3 * torch.randn(20, 20)).double()
    dense[:, 20:] += torch.randn(60, 20, 1)
    stats = lr.calibrate(conv, [dense])[""]
    whole, held = (PairedMoments.before_any(stats.inputs) for _ in range(2))
    for moments, part in ((whole, slice(None)), (held, slice(45, None))):
        ours, theirs = (each[part, :, 0].unflatten(1, (2, 20)).movedim(1, 0) for each in (x, dense))
        moments.add(sums(ours), sums(ours, theirs), ours.shape[1])
    cross = whole.cross - whole.target_mean[:, :, None] * whole.inputs.mean[:, None]
    own = stats.changed(inputs=whole.inputs, cross=cross, target_mean=whole.target_mean)
    found = anchored(conv, own, held, DAMPING, has_bias=True)
    assert torch.allclose(found.cross[0], own.cross[0])
    moment = whole.inputs.covariance()[1]
    followed = torch.dist(found.cross[1], moment) / torch.dist(own.cross[1], moment)
    assert followed < 0.5


def network() -> nn.Sequential:
    sizes = [32] * 6
    layers = [part for size in sizes for part in (nn.Linear(size, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 10)).double()


@pytest.mark.parametrize("batches", [1, 4])
def test_few_rows_do_no_harm(batches):
    """On unseen rows, over ten networks: below one shot, with two rows per column and with forty."""
    for rows in (64, 1280):
        errors = []
        for seed in range(10):
            torch.manual_seed(seed)
            model, unseen = network(), torch.randn(500, 32).double()
            data = list(torch.randn(rows, 32).double().chunk(batches))
            stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
            plan = lr.make_plan(model, lr.Budget(params=0.5), stats)
            small = [lr.factorize_(copy.deepcopy(model), plan, stats=stats, data=each) for each in (None, data)]
            with torch.no_grad():
                errors.append([float(torch.dist(each(unseen), model(unseen))) for each in small])
        one_shot, sequential = torch.tensor(errors).mean(0)
        assert sequential < one_shot
