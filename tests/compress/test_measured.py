"""Options of layers in the units of what they were measured to do to the model's output."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.compress.measured import SHARE, SURE, TEMPERATURE, VISIBLE

SVD = [lr.SVDMethod()]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    sizes = (24, 32, 28, 20)
    parts = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(20, 10)).double()


class Branches(nn.Module):
    """Two layers with the same weights and inputs, of which one is multiplied by a small number."""

    def __init__(self, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.share, self.loud, self.quiet = share, nn.Linear(20, 20), nn.Linear(20, 20)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(x).tanh() + self.share * self.quiet(x).tanh()


def alone(model: nn.Module, stats: lr.Statistics | None, name: str, rank: int) -> nn.Module:
    """A copy in which one layer is of low rank."""
    plan = lr.make_plan(model, rank=1, stats=stats, methods=SVD)
    for entry in list(plan):
        plan.set_rank(entry.name, rank) if entry.name == name else plan.drop(entry.name)
    return lr.factorize_(copy.deepcopy(model), plan, stats=stats)


def kl(model: nn.Module, small: nn.Module, batches: list[Tensor], temperature: float = 1.0) -> float:
    """The mean divergence of the predictions over all rows, softened, times the squared temperature."""
    x = torch.cat(batches)
    ours, dense = ((net(x) / temperature).log_softmax(-1) for net in (small, model))
    return temperature**2 * float(F.kl_div(ours, dense, reduction="batchmean", log_target=True))


@torch.no_grad()
def relative_error(model: nn.Module, small: nn.Module, batches: list[Tensor]) -> float:
    """The squared error of the output over its variance, of equal batches."""
    errors = [
        float((small(x) - model(x)).square().sum() / (model(x) - model(x).mean(0)).square().sum()) for x in batches
    ]
    return sum(errors) / len(errors)


MEASURES = {"divergence": (lr.SampledCrossEntropy, kl), "relative error": (lambda: None, relative_error)}


@pytest.mark.parametrize("name", ["0", "2", "4", "6"])
@pytest.mark.parametrize(("loss", "distance"), MEASURES.values(), ids=MEASURES)
def test_a_layer_has_the_loss_that_the_model_has_with_it_alone(loss, distance, name):
    """Exact at the rank that was tried; the rest of its curve is in proportion."""
    model, batches = network(), list(torch.randn(400, 24).double().split(100))
    stats = lr.calibrate(model, batches, loss=loss())
    rows, columns = model.get_submodule(name).weight.shape
    tried = int(SHARE * (rows * columns + rows) - rows) // (rows + columns)
    with torch.no_grad():
        found = distance(model, alone(model, stats, name, tried), batches)
    tails = lr.Candidate(model.get_submodule(name), stats[name]).tails[0]
    for fraction in (0.3, 0.6):
        entry = lr.make_plan(model, lr.Budget(params=fraction), stats, SVD, batches=batches)[name]
        expected = 0.0 if entry.rank is None else found * float(tails[entry.rank] / tails[tried])
        assert entry.loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("sharpness", "temperature"), [(1.0, 1.0), (100.0, TEMPERATURE)])
def test_predictions_that_are_nearly_certain_are_softened(sharpness, temperature):
    """A layer alone may break a classifier, and then the divergence of its own predictions saturates."""
    model, batches = network(), list(torch.randn(400, 24).double().split(100))
    with torch.no_grad():
        model[6].weight *= sharpness
        entropy = torch.distributions.Categorical(logits=model(torch.cat(batches))).entropy().mean()
    assert (entropy < SURE) == (sharpness > 1)
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats, SVD, batches=batches)
    tried = int(SHARE * (24 * 32 + 32) - 32) // (24 + 32)
    with torch.no_grad():
        found = kl(model, alone(model, stats, "0", tried), batches, temperature)
    tails = lr.Candidate(model[0], stats["0"]).tails[0]
    assert plan["0"].rank is not None
    assert plan["0"].loss == pytest.approx(found * float(tails[plan["0"].rank] / tails[tried]), rel=1e-6)


@pytest.mark.parametrize("sharpness", [1.0, 100.0])
def test_classes_that_the_model_rules_out_change_nothing(sharpness):
    """Two classes of minus infinity beside a model without them: entropies and divergences are the same."""

    class Ruled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (1, 1), value=-torch.inf)

    model, batches = network(), list(torch.randn(400, 24).double().split(100))
    with torch.no_grad():
        model[6].weight *= sharpness
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    ruled = nn.Sequential(*model, Ruled())
    plans = [lr.make_plan(each, lr.Budget(params=0.4), stats, SVD, batches=batches) for each in (model, ruled)]
    assert [entry.loss for entry in plans[1]] == pytest.approx([entry.loss for entry in plans[0]], rel=1e-6)


def test_losses_of_a_single_linear_layer_are_its_relative_errors_at_every_rank():
    """Of the output of a linear model the squared error is quadratic: nothing is left to measure elsewhere."""
    model, batches = nn.Sequential(nn.Linear(20, 16)).double(), [torch.randn(500, 20).double()]
    stats = lr.calibrate(model, batches)
    for fraction in (0.2, 0.5, 0.8):
        plan = lr.make_plan(model, lr.Budget(params=fraction), stats, SVD, batches=batches)
        small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
        with torch.no_grad():
            assert plan.loss == pytest.approx(relative_error(model, small, batches), rel=2e-3)  # damping


def test_the_budget_goes_where_the_output_depends_on_it():
    model, batches = Branches(0.01), [torch.randn(300, 20)]
    stats = lr.calibrate(model, batches)
    plain, measured = (
        lr.make_plan(model, lr.Budget(params=0.55), stats, SVD, batches=seen) for seen in (None, batches)
    )
    assert abs(plain["loud"].rank - plain["quiet"].rank) <= 1
    assert measured["loud"].rank > 2 * measured["quiet"].rank
    built = (lr.factorize_(copy.deepcopy(model), each, stats=stats) for each in (plain, measured))
    errors = [relative_error(model, small, batches) for small in built]
    assert errors[1] < errors[0] / 2


def test_padding_is_not_measured():
    """What a model does at positions that its mask leaves out changes no effect."""
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(30, 24), nn.Linear(24, 24), nn.Linear(24, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.hidden(self.embed(input_ids)).tanh())

    model, ids, mask = Tagger(), torch.randint(1, 30, (6, 10)), torch.ones(6, 10, dtype=torch.long)
    mask[:, 7:] = 0
    other = torch.where(mask.bool(), ids, torch.zeros_like(ids))
    plans = []
    for x in (ids, other):
        batches = [{"input_ids": x, "attention_mask": mask}]
        stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
        plans.append(lr.make_plan(model, lr.Budget(params=0.6), stats, SVD, ["embed"], batches=batches))
    assert [entry.loss for entry in plans[0]] == pytest.approx([entry.loss for entry in plans[1]], rel=1e-4)


def test_what_is_planned_and_built_is_within_the_budget_and_leaves_the_model_alone():
    model, batches = network(), [torch.randn(200, 24).double()]
    model.train()
    before = copy.deepcopy(model.state_dict())
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, units="measured", batches=iter(batches))
    assert plan.settings["units"] == "measured"
    assert plan == lr.make_plan(model, lr.Budget(params=0.5), stats, batches=batches)
    assert plan.after.params <= 0.5 * plan.total.params
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


def test_a_limit_on_the_loss_is_one_on_what_was_measured():
    model, batches = network(), [torch.randn(400, 24).double()]
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(loss=1e-3), stats, SVD, batches=batches)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    assert plan.loss <= 1e-3
    with torch.no_grad():
        assert 3e-4 < kl(model, small, batches) < 3e-3


WRONG = {
    "units without batches": ({"units": "measured"}, "got units='measured' without batches"),
    "batches for other units": (
        {"units": "balanced", "batches": [torch.zeros(2, 24)]},
        "got batches with units='balanced'",
    ),
    "no batches": ({"batches": []}, "got no batches"),
    "one batch": ({"batches": torch.zeros(2, 24)}, "got one Tensor, expected a list of batches"),
    "effects and batches": (
        {"batches": [torch.zeros(2, 24)], "effects": {"0": 1.0}},
        "got batches and effects, expected one of them",
    ),
    "effects for other units": ({"effects": {"0": 1.0}, "units": "absolute"}, "got effects with units='absolute'"),
    "effects of another model": ({"effects": {"conv1": 1.0}}, "got effects that do not know '0'"),
    "no effects": ({"effects": [1.0]}, "got effects of type list"),
    "an effect of nothing": (
        {"effects": {"0": 1.0, "2": 0.0, "4": 1.0, "6": 1.0}},
        "got the effect 0.0 of '2', expected a positive number",
    ),
    "alds": ({"batches": [torch.zeros(2, 24)], "allocation": "alds"}, "another allocation"),
}


def test_what_was_measured_for_one_budget_serves_for_others():
    model, batches = network(), [torch.randn(300, 24).double()]
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    first = lr.Plan.from_json(lr.make_plan(model, lr.Budget(params=0.7), stats, batches=batches).to_json())
    assert set(first.effects) == {entry.name for entry in first}
    again = lr.make_plan(model, lr.Budget(params=0.4), stats, effects=first.effects)
    assert again == lr.make_plan(model, lr.Budget(params=0.4), stats, batches=batches)
    assert not lr.make_plan(model, lr.Budget(params=0.4), stats).effects


UNITS = ("absolute", "balanced", "relative")


@pytest.mark.parametrize(("exponent", "units"), [(0.5, "absolute"), (-0.5, "balanced"), (-1.5, "relative")])
def test_layers_compare_by_the_mean_of_what_is_measured_and_the_default_without_it(exponent, units):
    """In the logarithm: ``sqrt(effect * loss * loss / sqrt(energy))`` for a model that reads no tokens."""
    model, batches = Branches(0.6), [torch.randn(300, 20)]
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    layers = {name: lr.Candidate(model.get_submodule(name), stats[name]) for name in ("loud", "quiet")}
    effects = {name: layer.energy**exponent for name, layer in layers.items()}
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, SVD, effects=effects)
    plans = {each: lr.make_plan(model, lr.Budget(params=0.5), stats, SVD, units=each) for each in UNITS}
    ranks = [entry.rank for entry in plan]
    assert {each: ranks == [entry.rank for entry in other] for each, other in plans.items()} == {
        each: each == units for each in UNITS
    }
    for entry in plan:
        options = {option.rank: option.loss_increase for option in SVD[0].options(layers[entry.name])}
        assert entry.loss == pytest.approx(effects[entry.name] * options.get(entry.rank, 0.0), rel=1e-6)


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(lr.LowRankError, match=message):
        lr.make_plan(network(), lr.Budget(params=0.5), **options)


def test_a_model_without_a_tensor_in_its_output_is_refused():
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> dict[str, float]:
            return {"sum": float(self.layer(x).sum())}

    with pytest.raises(lr.LowRankError, match='the model returned a dict with "sum": float'):
        lr.make_plan(Scalar(), lr.Budget(params=0.5), batches=[torch.randn(4, 24)])


def test_a_layer_whose_error_is_nothing_is_measured_at_a_rank_where_it_is_something():
    model, batches = network(), [torch.randn(300, 24).double()]
    with torch.no_grad():
        model[2].weight.copy_(torch.outer(torch.randn(28), torch.randn(32)))
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats, SVD, batches=batches)
    assert plan["2"].rank == 1
    assert plan["2"].error <= VISIBLE**0.5
