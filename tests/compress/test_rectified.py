"""Layers fitted behind a rectifier: what is cut off in the dense model may be anything that is cut off."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.compress.rectified import Rectifier, rectifier_of

UNDAMPED = lr.Damping(inputs=0.0, outputs=0.0)


def test_the_target_is_dense_behind_the_rectifier_and_bounds_its_error_for_all_other_outputs():
    """Majorization: the error behind the rectifier is at most the distance from the target, equal where both agree."""
    rectifier = Rectifier(torch.randn(7), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0]))
    dense, fitted, other = torch.randn(3, 500, 7)
    target = rectifier.target(dense, fitted)
    assert torch.allclose(rectifier.passed(target), rectifier.passed(dense), atol=1e-6)
    for outputs in (fitted, other):
        error = (rectifier.passed(dense) - rectifier.passed(outputs)).abs()
        assert (error <= (target - outputs).abs() + 1e-6).all()
    cut = rectifier.passed(dense) == 0
    assert torch.allclose(rectifier.passed(fitted)[cut], (target - fitted).abs()[cut], atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_the_floor_of_a_batch_norm_is_where_its_output_is_zero(affine):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=affine), nn.ReLU(), nn.Conv2d(5, 2, 3))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        if affine:
            model[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3]))
            model[1].bias.normal_()
    images = torch.randn(4, 3, 8, 8)
    found = rectifier_of(model.eval(), "0", images, with_target=False)
    outputs = model[0](images).detach()
    passed = found.passed(outputs.movedim(1, -1)).movedim(-1, 1)
    assert torch.equal(passed > 1e-5, model[:3](images) > 1e-5 * scale_of(model[1]))
    assert rectifier_of(model, "3", images, with_target=False) is None


def scale_of(norm: nn.Module) -> Tensor:
    scale = (norm.running_var + norm.eps).rsqrt()
    return (scale if norm.weight is None else scale * norm.weight.abs())[:, None, None]


@pytest.mark.parametrize(
    ("activation", "cut"), [(nn.ReLU(), True), (nn.ReLU6(), True), (nn.GELU(), False), (nn.Tanh(), False)]
)
def test_rectifiers_are_found_by_trying(activation, cut):
    model = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 3))
    found = rectifier_of(model, "0", torch.randn(20, 6), with_target=False)
    assert (found is not None) is cut
    if cut:
        assert torch.equal(found.passed(torch.tensor([[-1.0, 0.0, 1.0, 2.0, -3.0]])), torch.tensor([[0.0, 0, 1, 2, 0]]))


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_behind_a_relu_is_below_that_of_the_reduced_rank_regression(bias):
    """The regression (Izenman, 1975) is the best of its rank before the ReLU, not behind it."""
    model = nn.Sequential(nn.Linear(12, 30, bias=bias), nn.ReLU(), nn.Linear(30, 4)).double()
    rows = (torch.randn(600, 12) @ torch.randn(12, 12) + 0.5).double()
    stats = lr.calibrate(model, [rows])
    plan = lr.make_plan(model, rank=2, stats=stats, damping=UNDAMPED).drop("2")

    def error(small: nn.Module, layers: int = 2) -> float:
        return float((small[:layers](rows) - model[:layers](rows)).detach().square().sum())

    plain = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    fitted = lr.factorize_(copy.deepcopy(model), plan, stats=stats, data=[rows], rectified=True)
    assert error(fitted) < 0.97 * error(plain)
    assert error(fitted, layers=1) > error(plain, layers=1)


def test_outputs_that_are_all_positive_prove_nothing():
    model = nn.Linear(6, 3)
    nn.init.constant_(model.bias, 100.0)
    assert rectifier_of(nn.Sequential(model), "0", torch.randn(20, 6), with_target=False) is None
