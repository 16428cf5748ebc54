"""Every weight is planned, or the plan says why it stays dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lowrank_layers as lr

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def with_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda *_: None)
    return linear


def with_backward_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_full_backward_hook(lambda *_: None)
    return linear


def own_parametrization(linear: nn.Linear) -> nn.Linear:
    class Symmetric(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.triu() + x.triu(1).mT

    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


class OwnLinear(nn.Linear):
    """Computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).square()


class Quantized(nn.Module):
    """A layer of which this library has never heard."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(8, 8))


LINEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "parametri"),
    "spectral_norm by hooks": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "parametri"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametri"),
    "weight_norm by hooks": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "parametri"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "parametri"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "parametri"),
    "pruned by rows": (lambda: prune.ln_structured(nn.Linear(8, 8), "weight", 0.5, n=2, dim=0), "parametri"),
    "own parametrization": (lambda: own_parametrization(nn.Linear(8, 8)), "parametri"),
    "hook": (lambda: with_hook(nn.Linear(8, 8)), "hooks"),
    "backward hook": (lambda: with_backward_hook(nn.Linear(8, 8)), "hooks"),
    "LSTM": (lambda: nn.LSTM(8, 8), "LSTM: torch's recurrent kernels"),
    "GRU": (lambda: nn.GRU(8, 8, num_layers=2, bidirectional=True), "GRU: torch's recurrent kernels"),
    "RNN": (lambda: nn.RNN(8, 8), "RNN: torch's recurrent kernels"),
    "LSTMCell": (lambda: nn.LSTMCell(8, 8), "no method for LSTMCell"),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 8), "no method for Bilinear"),
    "subclass": (lambda: OwnLinear(8, 8), r"no method for OwnLinear, a subclass of nn\.Linear"),
    "embedding bag with max": (lambda: nn.EmbeddingBag(8, 8, mode="max"), "no method for EmbeddingBag with mode='max'"),
    "unknown": (Quantized, "no method for Quantized"),
    "convolution, weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "parametri"),
    "embedding, spectral_norm": (lambda: parametrizations.spectral_norm(nn.Embedding(8, 8)), "parametri"),
}


@pytest.mark.parametrize(("build", "why"), LINEAR.values(), ids=LINEAR)
def test_a_layer_that_stays_dense_says_why(build, why, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), build())
    before = model[1]
    kind = type(before)
    plan = lr.make_plan(model, rank=2)
    assert [entry.name for entry in plan] == ["0"]
    assert list(plan.skipped) == ["1"]
    with pytest.raises(lr.LowRankError, match=why):
        plan["1"]
    assert f"1: left alone, {plan.skipped['1']}" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json").skipped == plan.skipped
    lr.factorize_(model, plan)
    assert model[1] is before
    assert type(model[1]) is kind
    assert isinstance(model[0], lr.LowRankLinear)


@pytest.mark.parametrize(("build", "why"), LINEAR.values(), ids=LINEAR)
def test_a_model_with_nothing_else_is_refused_with_the_reason(build, why):
    with pytest.raises(lr.LowRankError, match=f"nothing to factorize.*{why}"):
        lr.make_plan(nn.Sequential(build()), rank=2)


def test_what_was_folded_is_planned():
    """The remedy that the reason names works."""
    linear = parametrizations.weight_norm(nn.Linear(8, 8))
    parametrize.remove_parametrizations(linear, "weight")
    pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    prune.remove(pruned, "weight")
    plan = lr.make_plan(nn.Sequential(linear, pruned), rank=2)
    assert [entry.name for entry in plan] == ["0", "1"]
    assert plan.skipped == {}


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_tied_embedding_and_head_name_each_other(first):
    parts = {"embedding": nn.Embedding(30, 8), "head": nn.Linear(8, 30, bias=False)}
    parts["head"].weight = parts["embedding"].weight
    order = [first, *(name for name in parts if name != first)]
    model = nn.ModuleDict({**{name: parts[name] for name in order}, "fc": nn.Linear(8, 8)})
    plan = lr.make_plan(model, rank=2)
    assert plan.skipped == {
        "embedding": "its parameters are tied to 'head'",
        "head": "its parameters are tied to 'embedding'",
    }
    assert plan.total.params == 30 * 8 + 72


def test_three_layers_with_one_weight_name_each_other():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)), nn.Linear(8, 8))
    for k in (1, 2):
        model[k].weight = model[0].weight
    plan = lr.make_plan(model, rank=2)
    assert plan.skipped["0"] == "its parameters are tied to '1', '2'"
    assert plan.skipped["2"] == "its parameters are tied to '0', '1'"


def test_a_tied_bias_keeps_both_layers_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    assert set(lr.make_plan(model, rank=2).skipped) == {"0", "1"}


def test_what_calibration_never_reached_says_so():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half()
    plan = lr.make_plan(model, rank=2, stats=lr.calibrate(model, [torch.randn(20, 8)]))
    assert plan.skipped == {"unused": "calibration never reached it"}


def test_what_was_asked_says_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert lr.make_plan(model, rank=2, skip=["1"]).skipped == {"1": "as asked"}


class Routed(nn.Module):
    """Two experts; every row goes to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, (x, x[:0]), strict=True)])


@pytest.mark.parametrize("loss", [None, lr.SampledCrossEntropy()])
def test_an_expert_that_saw_no_rows_stays_dense(loss):
    """Its moments are zero, which is no knowledge of what it costs to cut it."""
    model = Routed()
    stats = lr.calibrate(model, [torch.randn(50, 16)], loss=loss)
    plan = lr.make_plan(model, lr.Budget(params=0.8), stats=stats)
    assert plan.skipped == {"experts.1": "calibration never reached it"}


class FixedFeatures(nn.Module):
    """A backbone without gradients, on which everything depends."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = torch.relu(self.backbone(x))
        return self.head(torch.relu(self.neck(x)))


@pytest.mark.parametrize("trainable", [False, True])
def test_what_ran_without_gradients_is_no_layer_without_effect(trainable):
    model = FixedFeatures().requires_grad_(trainable)
    stats = lr.calibrate(model, [torch.randn(50, 16)], loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats=stats)
    assert plan.skipped.keys() == {"backbone"}
    assert "its effect on the loss is not known" in plan.skipped["backbone"]
    assert plan.notes == {}
    # without a loss all three are known equally well
    assert len(lr.make_plan(model, lr.Budget(params=0.7), stats=lr.calibrate(model, [torch.randn(50, 16)]))) == 3


class Holder(nn.Module):
    """As a vision transformer: parameters of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, 16))
        self.scale = nn.Parameter(torch.ones(16))
        self.inner = nn.ModuleDict({"fc": nn.Linear(16, 16)})
        self.inner.register_parameter("position", nn.Parameter(torch.randn(4, 16)))


def test_parameters_that_a_model_holds_itself_are_listed_by_their_names():
    plan = lr.make_plan(Holder(), rank=2)
    assert plan.skipped == {
        "class_token": "a parameter of Holder itself, which no layer holds",
        "inner.position": "a parameter of ModuleDict itself, which no layer holds",
    }
    with pytest.raises(lr.LowRankError, match="'class_token'; it was skipped: a parameter of Holder"):
        plan["class_token"]


def test_every_weight_is_planned_or_has_a_reason():
    """Nothing with a matrix is passed over in silence."""
    model = nn.ModuleDict({f"layer {k}": build() for k, (build, _) in enumerate(LINEAR.values())})
    model["attention"] = nn.MultiheadAttention(8, 2)
    model["computed"] = parametrizations.orthogonal(nn.MultiheadAttention(8, 2), "in_proj_weight")
    model["fc"] = nn.Linear(8, 8)
    plan = lr.make_plan(model, rank=2)
    known = {entry.name for entry in plan} | set(plan.skipped)
    for name, parameter in model.named_parameters():
        owner = owner_of(name)
        opened = owner.startswith("attention")
        assert parameter.ndim < 2 or opened or owner in known, name


def owner_of(name: str) -> str:
    """The module to which a parameter belongs, whatever computes it."""
    return name.partition(".parametrizations")[0] if ".parametrizations" in name else name.rpartition(".")[0]
