"""SOAP is Adam in rotated coordinates, and solves what Adam's coordinates make hard."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(("shape", "max_size"), [((5,), 4096), ((), 4096), ((4, 3), 0), ((4, 3, 2), 2)])
def test_without_rotations_it_is_adam(shape, max_size):
    start = torch.ones(shape, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    soap = lr.SOAP([ours], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, max_size=max_size)
    adam = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    for gradient in gradients(shape, 5):
        ours.grad, theirs.grad = gradient, gradient.clone()
        soap.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 4), (6, 2, 3, 1)])
def test_rotating_the_problem_rotates_the_steps(shape):
    """Where every gradient has full rank, so that no eigenvector is arbitrary."""
    left = torch.linalg.qr(gradients((shape[0],) * 2, 1)[0])[0]
    start, steps = torch.zeros(shape, dtype=torch.float64), gradients(shape, 6)

    def run(turn):
        parameter = nn.Parameter(turn(start))
        optimizer = lr.SOAP([parameter], lr=0.1, refresh=2)
        for gradient in steps:
            parameter.grad = turn(gradient)
            optimizer.step()
        return parameter.detach()

    turned = run(lambda tensor: torch.tensordot(left, tensor, 1).contiguous())
    torch.testing.assert_close(turned, torch.tensordot(left, run(torch.clone), 1), rtol=1e-5, atol=1e-7)


def test_a_badly_conditioned_pair_of_factors_comes_closer_than_by_adam():
    """Columns that are almost equal: the gradient's largest directions lie far from the axes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.ones(16, 16) + 0.1 * torch.randn(16, 16, generator=generator)
    x = torch.randn(200, 16, generator=generator) @ mixing
    target = x @ torch.linalg.pinv(mixing) @ torch.randn(16, 3, generator=generator)
    layer = lr.LowRankLinear(16, 3, rank=3)
    ends = []
    for kind in (lr.SOAP, torch.optim.AdamW):
        model = copy.deepcopy(layer)
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        ends.append(float(loss.detach()))
    assert ends[0] < 0.5 * ends[1]


def test_the_state_goes_on():
    start, steps = nn.Parameter(torch.ones(4, 3)), gradients((4, 3), 8)
    other = nn.Parameter(start.detach().clone())
    whole, first = lr.SOAP([start], refresh=3), lr.SOAP([other], refresh=3)
    for k, gradient in enumerate(steps):
        if k == 4:
            state = copy.deepcopy(first.state_dict())
            first = lr.SOAP([other], refresh=3)
            first.load_state_dict(state)
        for parameter, optimizer in ((start, whole), (other, first)):
            parameter.grad = gradient.float()
            optimizer.step()
    assert torch.equal(start, other)


def test_settings_out_of_range_are_refused():
    for wrong, message in (
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"decay": "x"}, "decay='x'"),
        ({"refresh": 0}, "refresh=0"),
    ):
        with pytest.raises(lr.LowRankError, match=message):
            lr.SOAP([nn.Parameter(torch.ones(2))], **wrong)
