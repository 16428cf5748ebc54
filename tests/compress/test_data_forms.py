"""``factorize_`` keeps to the plan's size, and refuses data of another form as ``calibrate`` does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 10, 3, bias=False),
        nn.Flatten(2),
        nn.Linear(64, 30, bias=False),
        nn.Linear(30, 8),
        nn.Linear(8, 8, bias=False),
    )


@pytest.fixture
def data() -> list[torch.Tensor]:
    return [torch.randn(40, 3, 6, 6) + 1]


METHODS = [[method] for method in lr.METHODS.values() if method.name != "tensorized"]


@pytest.mark.parametrize("methods", METHODS, ids=lambda methods: methods[0].name)
@pytest.mark.parametrize("known", [(), ("stats",), ("data",), ("stats", "data")], ids="-".join)
@pytest.mark.parametrize("planned_with", [False, True], ids=["plain", "calibrated"])
def test_the_model_is_never_larger_than_the_plan(model, data, methods, known, planned_with):
    stats = lr.calibrate(model, data)
    plan = lr.make_plan(model, rank=2, stats=stats if planned_with else None, methods=methods)
    lr.factorize_(model, plan, **{key: {"stats": stats, "data": data}[key] for key in known})
    size = sum(p.numel() for p in model.parameters())
    assert size == plan.after.params if known or not planned_with else size <= plan.after.params


@pytest.mark.parametrize("in_sequence", [False, True])
def test_without_a_new_bias_the_fit_goes_through_the_origin(data, in_sequence):
    """The best map of rank r without a bias, against the closed form on uncentred rows."""
    torch.manual_seed(0)
    rows = torch.randn(500, 12).double() @ torch.randn(12, 12).double() + 3
    model = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Identity()).double()
    stats = lr.calibrate(model, [rows])
    plan = lr.make_plan(model, rank=3)
    expected = model(rows)
    lr.factorize_(model, plan, stats=stats, data=[rows] if in_sequence else None)
    assert model[0].up.bias is None
    u, s, vh = torch.linalg.svd(expected.detach(), full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    assert torch.dist(model(rows), expected) <= 1.01 * torch.dist(best, expected)


def test_set_rank_on_a_dense_line_of_a_calibrated_plan_counts_the_new_bias(model, data):
    stats = lr.calibrate(model, data)
    plan = lr.make_plan(model, lr.Budget(params=1.0), stats=stats)
    assert plan["0"].method == "dense"
    plan.set_rank("0", 2)
    lr.factorize_(model, plan, stats=stats)
    assert plan.after.params == sum(p.numel() for p in model.parameters())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(x)
        return y, y + 1


BAD = {
    "a tensor": (lambda x: x, "got one Tensor, expected a list of batches"),
    "a dict": (lambda x: {"x": x}, "got one dict, expected a list of batches"),
    "a number": (lambda x: 3, "got int, expected a list of batches"),
    "no batches": (lambda x: [], "no batches"),
    "with a target": (lambda x: [(x, x)], "leave the target out, or calibrate with a loss"),
    "another keyword": (lambda x: [{"pixels": x}], "the keyword arguments pixels, which TwoInputs.forward"),
    "text": (lambda x: ["abc"], "a batch of type str"),
}


@pytest.mark.parametrize(("form", "why"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("calibrated", [False, True])
def test_data_of_another_form_is_refused_and_changes_nothing(form, why, calibrated):
    model = TwoInputs()
    x = torch.randn(20, 6)
    stats = lr.calibrate(model, [x]) if calibrated else None
    plan = lr.make_plan(model, rank=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lr.LowRankError, match=why):
        lr.factorize_(model, plan, stats=stats, data=form(x))
    assert type(model.fc) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if why != "no batches":
        with pytest.raises(lr.LowRankError, match=why):
            lr.calibrate(model, form(x))


def test_an_error_inside_the_model_is_the_models_own():
    class Wrong(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise TypeError("my own")

    with pytest.raises(TypeError, match="my own") as caught:
        lr.calibrate(Wrong(nn.Linear(2, 2)), [torch.randn(3, 2)])
    assert type(caught.value) is TypeError


def test_a_model_with_several_outputs_is_factorized_in_sequence():
    model, x = TwoInputs(), torch.randn(20, 6)
    lr.factorize_(model, lr.make_plan(model, rank=2), data=[x])
    assert isinstance(model.fc, lr.LowRankLinear)
