"""What the model returns meets what the loss expects, or the error says how to bring them together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr


class Returns(nn.Module):
    """A model with outputs of another form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.body, self.form = nn.Linear(6, 5), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


@dataclass
class States:
    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


FORMS = {
    "(logits, loss)": (lambda y: (y, y.mean()), r"a tuple of \(tensor \[4, 5\], tensor \[\]\)", "output[0]"),
    "(loss, logits)": (lambda y: (y.mean(), y), r"a tuple of \(tensor \[\], tensor \[4, 5\]\)", "output[1]"),
    "list": (lambda y: [y], r"a list of \(tensor \[4, 5\]\)", "output[0]"),
    "dict": (lambda y: {"out": y}, r'a dict with "out": tensor \[4, 5\]', 'output["out"]'),
    "dataclass": (States, r"a States with last_hidden_state: tensor \[4, 5\]", "output.last_hidden_state"),
    "namespace": (lambda y: SimpleNamespace(y=y), "a SimpleNamespace", "output."),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", [lr.SampledCrossEntropy(), lambda output, target: F.cross_entropy(output, target)])
def test_other_outputs_are_named_with_the_way_to_wrap_them(form, loss):
    make, came, remedy = FORMS[form]
    model = Returns(make)
    batch = (torch.randn(4, 6), torch.randint(5, (4,)))
    for run in (lr.calibrate, lr.weight_gradients):
        with pytest.raises(lr.LowRankError, match=came) as caught:
            run(model, [batch], loss)
        assert remedy in str(caught.value)
    if form != "namespace":
        part = eval(f"lambda output: {remedy}")  # the remedy as it is written
        wrapped = lr.calibrate(model, [batch], lambda output, target: F.cross_entropy(part(output), target))
        assert wrapped["body"].gradients is not None
    assert model.body.weight.requires_grad
    assert not model.body._forward_hooks


def test_hidden_states_of_transformers_are_named():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Returns(lambda y: outputs.BaseModelOutput(last_hidden_state=y))
    with pytest.raises(lr.LowRankError, match="a BaseModelOutput with last_hidden_state: tensor") as caught:
        lr.calibrate(model, [torch.randn(4, 6)], lr.SampledCrossEntropy())
    assert "output.last_hidden_state" in str(caught.value)


def test_an_error_inside_a_loss_of_tensors_is_its_own():
    def loss(output: Tensor, target: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lr.calibrate(nn.Linear(6, 5), [torch.randn(4, 6)], loss)


def against_itself() -> dict[str, Any]:
    return {
        "mean square": F.mse_loss,
        "KL": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"),
        "KL of logarithms": lambda a, b: F.kl_div(
            a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True
        ),
        "cross-entropy": lambda a, b: F.cross_entropy(a, b.softmax(-1)),
        "cosine": lambda a, b: 1 - F.cosine_similarity(a, b).mean(),
    }


@pytest.mark.parametrize("name", against_itself())
@pytest.mark.parametrize("form", [lambda y: y, lambda y: (y,), States], ids=["tensor", "tuple", "dataclass"])
def test_a_model_compared_with_itself_is_refused(name, form):
    """Its gradients are zero, or the rounding of zeros; those against another model, however close, are not."""
    distance = against_itself()[name]
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Returns(form))
    model[2].body = nn.Linear(16, 5)
    teacher = copy.deepcopy(model)

    def part(output: Any) -> Tensor:
        return (
            output
            if isinstance(output, Tensor)
            else output[0]
            if isinstance(output, tuple)
            else output.last_hidden_state
        )

    def loss(output: Any, target: Tensor) -> Tensor:
        return distance(part(output), target)

    x = torch.randn(32, 6)
    with pytest.raises(lr.LowRankError, match="no gradient at this model's output"):
        lr.calibrate(model, [(x, part(teacher(x)).detach())], loss)
    with torch.no_grad():
        teacher[2].body.weight.add_(0.05 * torch.randn(5, 16))
    close = lr.calibrate(model, [(x, part(teacher(x)).detach())], loss)
    assert float(close["0"].gradients.diagonal().sum()) > 0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_small_gradients_are_no_missing_ones(scale):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    x, y = torch.randn(32, 6), torch.randint(5, (32,))
    expected = lr.calibrate(model, [(x, y)], F.cross_entropy)
    stats = lr.calibrate(model, [(x, y)], lambda output, target: scale * F.cross_entropy(output, target))
    for name, want in expected.items():
        assert torch.allclose(stats[name].gradients / scale**2, want.gradients, rtol=1e-4)


def test_lazy_modules_are_refused_with_the_remedy():
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    for call in (lambda: lr.make_plan(lazy, rank=2), lambda: lr.calibrate(lazy, [torch.randn(4, 8)])):
        with pytest.raises(lr.LowRankError, match="LazyLinear"):
            call()
    assert lazy[0].weight.requires_grad
    assert type(lazy[1]) is nn.LazyLinear


@pytest.mark.parametrize("classes", [1000, 5000])
def test_labels_are_drawn_from_the_prediction(classes):
    """Of few classes and of many, which are drawn in another way; those without a chance never."""
    weights = torch.zeros(classes)
    weights[10::100] = torch.rand(len(weights[10::100])) + 0.1
    chances = (weights / weights.sum()).expand(20000, -1)
    labels = lr.SampledCrossEntropy(seed=1)._sampled(chances)
    counts = torch.bincount(labels, minlength=classes)
    assert not bool(counts[weights == 0].any())
    expected = chances[0] * len(chances)
    deviation = (counts - expected)[weights > 0] / expected[weights > 0].sqrt()
    assert float(deviation.square().mean()) < 2  # a chi-square of one per degree of freedom, with 10 or 50 of them
    assert torch.equal(labels, lr.SampledCrossEntropy(seed=1)._sampled(chances))
