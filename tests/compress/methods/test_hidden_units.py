"""Hidden units as a method of a plan: priced, chosen beside methods of single layers, built, edited and saved."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.compress import sequential
from lowrank_layers.compress.anchoring import anchored
from lowrank_layers.compress.damping import Damping
from lowrank_layers.compress.hidden_units.problem import unit_problem
from lowrank_layers.compress.registry import usual_methods
from lowrank_layers.layers.resized import is_resized

METHODS = [lr.SVDMethod(), lr.PivotMethod(), lr.HiddenUnitsMethod()]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def calibrated(model: nn.Module, batches: list) -> lr.Statistics:
    return lr.calibrate(model, batches, lr.SampledCrossEntropy())


def perceptron(inputs: int = 16, hidden: int = 64) -> tuple[nn.Module, list[torch.Tensor]]:
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 4)).eval()
    return model, [torch.randn(50, inputs) for _ in range(6)]


class Gated(nn.Module):
    """A gated perceptron with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 32, bias=False), nn.Linear(12, 32, bias=False), nn.Linear(32, 12)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Blocks(nn.Module):
    """Convolutional residual blocks with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.parts = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, 1, 1)])
            for _ in range(2)
        )

    def forward(self, x):
        x = F.relu(self.stem(x))
        for first, norm, second in self.parts:
            x = F.relu(x + second(F.relu(norm(first(x)))))
        return self.head(x.mean((2, 3)))


def gated() -> tuple[nn.Module, list[torch.Tensor]]:
    return nn.Sequential(Gated(), Gated(), nn.Linear(12, 5)).eval(), [torch.randn(60, 12) for _ in range(6)]


def blocks() -> tuple[nn.Module, list[torch.Tensor]]:
    model, batches = Blocks(), [torch.randn(8, 3, 8, 8) for _ in range(6)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return model.eval(), batches


MODELS = {"perceptron": perceptron, "gated": gated, "blocks": blocks}


@pytest.mark.parametrize("kind", MODELS)
def test_the_predicted_loss_is_the_weighted_error_of_the_reader(kind):
    model, batches = MODELS[kind]()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, [lr.HiddenUnitsMethod()], units="absolute")
    small = lr.factorize_(copy.deepcopy(model), plan, stats)
    cut = [entry for entry in plan if entry.method == "hidden_units"]
    assert cut
    for name in {entry.settings["consumer"] for entry in cut}:
        dense, new, entry = model.get_submodule(name), small.get_submodule(name), plan[name]
        problem = unit_problem(dense, stats[name].changed(free_bias=False), plan.damping)
        kept = torch.tensor([k for k in range(entry.settings["count"]) if _stays(model, small, entry, k)])
        full = torch.zeros_like(problem.weight).unflatten(1, (entry.settings["count"], -1))
        full[:, kept] = new.weight.detach().double().flatten(1).unflatten(1, (len(kept), -1))
        assert entry.loss == pytest.approx(problem.loss(full.flatten(1)), rel=1e-4)
        assert all(plan[other].loss == 0 for other in entry.settings["producers"])
    assert plan.loss == pytest.approx(sum(entry.loss for entry in cut))


def _stays(model: nn.Module, small: nn.Module, entry: lr.Entry, unit: int) -> bool:
    """Whether a unit of the dense model is one of the small one: its row of the first producer is there."""
    name = entry.settings["producers"][0]
    row = model.get_submodule(name).weight[unit]
    return bool((small.get_submodule(name).weight == row).flatten(1).all(1).any())


@pytest.mark.parametrize("kind", MODELS)
def test_the_result_has_the_sizes_of_the_plan_and_keeps_the_budget(kind):
    model, batches = MODELS[kind]()
    stats, before = calibrated(model, batches), params(model)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, [lr.HiddenUnitsMethod()])
    assert before == plan.total.params
    small = lr.factorize_(model, plan, stats)
    assert params(small) == plan.after.params <= 0.6 * before
    entries = [entry for entry in plan if entry.method == "hidden_units"]
    assert all(is_resized(small.get_submodule(entry.name)) for entry in entries)
    assert {type(module) for module in small.modules()} == {type(module) for module in MODELS[kind]()[0].modules()}


def test_one_shot_is_what_remove_units_leaves():
    model, batches = perceptron()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, METHODS)
    assert [entry.method for entry in plan] == ["hidden_units"] * 2
    loss = lr.SampledCrossEntropy()
    other = lr.remove_units_(copy.deepcopy(model), batches, lr.Budget(params=0.5), loss, damping=plan.damping)
    lr.factorize_(model, plan, stats)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_macs_are_those_of_the_smaller_layers():
    model, batches = blocks()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(macs=0.6), stats, [lr.HiddenUnitsMethod()])
    small = lr.factorize_(model, plan, stats)
    macs = sum(lr.layer_cost(small.get_submodule(e.name), _shape(e)).macs for e in plan if e.input_shape is not None)
    assert macs == sum(entry.after.macs for entry in plan)
    assert plan.after.macs <= 0.6 * plan.total.macs


def _shape(entry: lr.Entry) -> tuple[int, ...]:
    assert entry.input_shape is not None
    if entry.is_grouped:
        shape = entry.group.shape_at(entry.name, entry.input_shape, entry.layer, entry.rank)
        assert shape is not None
        return shape
    return entry.input_shape


def test_together_where_units_repeat_each_other_and_by_pairs_where_ranks_are_low():
    batches = [torch.randn(50, 16) for _ in range(6)]
    twins, low = (nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).eval() for _ in range(2))
    with torch.no_grad():
        for own in (twins[0].weight, twins[0].bias):
            own.copy_(own[:32].repeat(2, *[1] * (own.ndim - 1)))
        low[0].weight.copy_(torch.randn(64, 3) @ torch.randn(3, 16) / 4)
        low[2].weight.copy_(torch.randn(16, 3) @ torch.randn(3, 64) / 8)
    methods = {}
    for name, model in (("twins", twins), ("low", low)):
        stats = calibrated(model, batches)
        plan = lr.make_plan(model, lr.Budget(params=0.52), stats, METHODS, units="absolute")
        methods[name] = {entry.method for entry in plan}
    assert methods["twins"] == {"hidden_units"}
    assert methods["low"] <= {"svd", "pivot"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_the_loss_is_never_above_that_without_the_method(kind, share):
    model, batches = MODELS[kind]()
    stats = calibrated(model, batches)
    budget = lr.Budget(params=share)
    alone, both = (lr.make_plan(model, budget, stats, methods, units="absolute") for methods in (METHODS[:2], METHODS))
    assert both.loss <= alone.loss * (1 + 1e-9)
    assert both.after.params <= share * both.total.params


def test_plans_without_the_method_are_what_they_were():
    model, batches = gated()
    stats = calibrated(model, batches)
    assert "hidden_units" not in lr.METHODS
    plans = [lr.make_plan(model, lr.Budget(params=0.5), stats, methods) for methods in (None, None)]
    assert plans[0] == plans[1]
    assert "uniform" not in plans[0].settings


def test_chained_units_share_no_layer():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(24, 24), nn.ReLU()))).eval()
    batches = [torch.randn(100, 24) for _ in range(4)]
    stats = lr.calibrate(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats, METHODS, units="absolute")
    small = lr.factorize_(model, plan, stats, batches)
    assert params(small) == plan.after.params
    assert small(batches[0]).shape == (100, 24)


@pytest.mark.parametrize("kind", MODELS)
def test_in_sequence_the_reader_is_fitted_on_what_the_small_prefix_delivers(kind):
    model, batches = MODELS[kind]()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, METHODS)
    assert any(entry.is_grouped for entry in plan)
    shot = lr.factorize_(copy.deepcopy(model), plan, stats)
    small = lr.factorize_(copy.deepcopy(model), plan, stats, batches)
    assert params(small) == params(shot) == plan.after.params
    x = torch.cat(batches)
    errors = [float((each(x) - model(x)).square().mean().detach()) for each in (shot, small)]
    assert errors[1] < 1.05 * errors[0]


def test_in_sequence_readers_are_anchored_by_the_ridge_of_units_and_others_by_their_own(monkeypatch):
    model, batches = gated()
    stats, small, seen = calibrated(model, batches), copy.deepcopy(model), {}

    def noted(layer, known, held_out, damping, outputs, *, has_bias):
        seen[next(name for name, each in small.named_modules() if each is layer)] = damping
        return anchored(layer, known, held_out, damping, outputs, has_bias=has_bias)

    monkeypatch.setattr(sequential, "anchored", noted)
    damping = Damping(inputs=1e-6, units=0.03)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, [lr.HiddenUnitsMethod()], damping=damping)
    lr.factorize_(small, plan, stats, batches)
    assert plan["1.down"].is_grouped
    assert seen["1.down"] == damping.of_units != damping
    assert seen["1.gate"] == seen["2"] == damping


def test_units_that_others_predict_cost_nothing_in_sequence_either():
    model, batches = perceptron(hidden=20)
    with torch.no_grad():
        model[0].weight[10:], model[0].bias[10:] = model[0].weight[:10], model[0].bias[:10]
    stats, before = calibrated(model, batches), model(batches[0])
    plan = lr.make_plan(model, lr.Budget(params=0.55), stats, METHODS, damping=Damping(inputs=1e-8))
    assert plan["2"].label == "hidden_units"
    lr.factorize_(model, plan, stats, batches)
    assert model[0].out_features <= 11
    assert torch.allclose(model(batches[0]), before, atol=1e-3)


def test_plans_are_saved_loaded_and_edited_as_a_whole(tmp_path):
    model, batches = blocks()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, [lr.HiddenUnitsMethod()])
    plan.save(tmp_path / "plan.json")
    loaded = lr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert "hidden_units" in str(plan)
    names = ["parts.0.0", "parts.0.1", "parts.0.2"]
    loaded.set_rank("parts.0.0", 5)
    assert [loaded[name].rank for name in names] == [5, 5, 5]
    assert loaded["parts.0.2"].loss is None
    small = lr.factorize_(copy.deepcopy(model), loaded, stats)
    assert small.parts[0][2].in_channels == small.parts[0][1].num_features == 5
    assert params(small) == loaded.after.params
    loaded.drop("parts.0.2")
    assert [loaded[name].method for name in names[::2]] == ["dense", "dense"]
    assert names[1] not in loaded
    again = lr.factorize_(copy.deepcopy(model), loaded, stats)
    assert again.parts[0][0].out_channels == 16
    assert params(again) == loaded.after.params


def test_edits_that_cannot_be_are_refused_and_change_nothing():
    model, batches = perceptron()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, METHODS)
    before = plan.to_json()
    for edit in (
        lambda: plan.set_rank("0", 65),
        lambda: plan.set_rank("0", 0),
        lambda: plan.set_rank("0", 4, method="svd"),
        lambda: plan.set_bits("2", 8),
    ):
        with pytest.raises(lr.LowRankError, match=r"expected|drop"):
            edit()
    assert plan.to_json() == before


def test_what_cannot_be_asked_for_is_refused():
    model, batches = perceptron()
    stats, budget = calibrated(model, batches), lr.Budget(params=0.5)
    method = lr.HiddenUnitsMethod()
    with pytest.raises(lr.LowRankError, match="without statistics"):
        lr.make_plan(model, budget, None, [lr.SVDMethod(), method])
    with pytest.raises(lr.LowRankError, match="rank="):
        lr.make_plan(model, None, stats, [method], rank=4)
    with pytest.raises(lr.LowRankError, match="latency"):
        lr.make_plan(model, lr.Budget(latency=0.5), stats, [method])
    for wrong in ({"methods": [lr.SVDMethod()]}, {"bits": 8}):
        with pytest.raises(lr.LowRankError, match="uniform"):
            lr.make_plan(model, budget, stats, uniform=True, **wrong)
    with pytest.raises(lr.LowRankError, match="several layers at once"):
        lr.progressive_(model, [0.5], methods=[method], data=batches)
    alone = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(lr.LowRankError, match="none of the planned layers"):
        lr.make_plan(alone, budget, calibrated(alone, batches), [method])
    with pytest.raises(lr.BudgetError, match="the smallest this model can become"):
        lr.make_plan(model, lr.Budget(params=3), stats, METHODS)


def test_a_failure_leaves_the_model_bit_identical():
    model, batches = gated()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, [lr.HiddenUnitsMethod()])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters())
    half = copy.deepcopy(plan)
    name = next(entry.name for entry in plan if entry.is_grouped)
    half._entries[name] = copy.deepcopy(plan).drop(name)[name]
    for call in (
        lambda: lr.factorize_(model, plan),
        lambda: lr.factorize_(model, plan, stats, optimizer=optimizer),
        lambda: lr.factorize_(model, half, stats),
        lambda: lr.factorize_(model, plan, stats, [*batches, torch.full((2, 12), float("nan"))]),
    ):
        with pytest.raises(lr.LowRankError):
            call()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert not any(map(is_resized, model.modules()))


def test_files_of_models_hold_the_sizes(tmp_path):
    model, batches = blocks()
    dense, stats = copy.deepcopy(model), calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.4), stats, METHODS)
    assert any(entry.is_grouped for entry in plan)
    lr.factorize_(model, plan, stats, batches)
    lr.save(model, tmp_path / "small.safetensors")
    loaded = lr.load(tmp_path / "small.safetensors", into=dense)
    assert torch.equal(loaded(batches[0]), model(batches[0]))


def test_measured_groups_compete_with_measured_layers():
    model, batches = gated()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, METHODS, batches=batches)
    assert plan.settings["units"] == "measured"
    assert any(name.startswith("hidden_units of ") for name in plan.effects)
    again = lr.make_plan(model, lr.Budget(params=0.6), stats, METHODS, effects=plan.effects)
    assert [(e.name, e.method, e.rank) for e in again] == [(e.name, e.method, e.rank) for e in plan]


def test_beside_groups_single_layers_may_be_stored_in_int8():
    model, batches = gated()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(bytes=0.5), stats, METHODS, bits=8)
    assert plan.after.bytes <= 0.5 * plan.total.bytes
    assert all(entry.bits is None for entry in plan if entry.is_grouped)
    mixed = lr.make_plan(model, lr.Budget(params=0.5), stats, METHODS[-1:]).set_bits("2", 8)
    lr.factorize_(model, mixed, stats, batches)
    assert type(model[2]).__name__ == "Int8Linear"
    assert model[0].down.in_features == mixed["0.down"].rank


def test_rectified_layers_beside_groups():
    model, batches = blocks()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.3), stats, METHODS)
    assert any(entry.is_grouped for entry in plan)
    lr.factorize_(model, plan, stats, batches, rectified=True)
    assert params(model) == plan.after.params


def test_refinement_keeps_the_sizes():
    model, batches = gated()
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, [lr.HiddenUnitsMethod()])
    lr.factorize_(model, plan, stats, batches, refine=1)
    assert params(model) == plan.after.params
    assert is_resized(model[0].down)


def test_uniform_plans_keep_one_size_of_layers_that_are_alike():
    model, batches = gated()
    with torch.no_grad():
        model[0].down.weight.mul_(0.1)
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, uniform=True)
    ranks = {entry.rank for entry in plan if entry.is_grouped}
    assert len(ranks) == 1
    assert sum(entry.is_grouped for entry in plan) == 6
    lr.factorize_(model, plan, stats, batches)
    assert params(model) == plan.after.params <= 0.6 * plan.total.params
    assert is_resized(model[0].gate)  # there is no configuration that could say the size


def test_a_uniform_plan_leaves_an_ordinary_folder_of_transformers(tmp_path):
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(2, 60, (8, 24))
    batches = [{"input_ids": rows} for rows in tokens.split(2)]
    stats = calibrated(model, batches)
    plan = lr.make_plan(model, lr.Budget(params=0.85), stats, METHODS[-1:], uniform=True)
    assert {e.name.rpartition(".")[2] for e in plan if e.is_grouped} == {"gate_proj", "up_proj", "down_proj"}
    lr.factorize_(model, plan, stats, batches)
    assert params(model) <= 0.85 * plan.total.params
    assert model.config.intermediate_size == plan["model.layers.0.mlp.down_proj"].rank < 48
    model.save_pretrained(tmp_path)
    torch.save((tokens, model(tokens).logits), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules.update(torchvision=None)\n"
        "from transformers import LlamaForCausalLM\n"
        "model = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokens, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(tokens).logits, expected)\n"
        "assert 'lowrank_layers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def words():
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 50))


def test_it_competes_by_default_in_models_that_read_tokens():
    model, batches, budget = words(), [torch.randint(50, (32, 20))], lr.Budget(params=0.4)
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, budget, stats)
    assert plan == lr.make_plan(model, budget, stats, [*usual_methods(), lr.HiddenUnitsMethod()])
    assert plan["1"].method == plan["3"].method == "hidden_units"
    assert plan.loss < lr.make_plan(model, budget, stats, usual_methods()).loss
    without_gradients = lr.make_plan(model, budget, lr.calibrate(model, batches))
    assert not any(entry.is_grouped for entry in without_gradients)


def test_its_ridge_keeps_units_that_are_hardly_ever_on():
    """The unit of the least variance has the largest weight; without a ridge it goes first."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity(), nn.Linear(4, 4, bias=False))
    model[0].weight.data, model[2].weight.data = torch.eye(4), torch.diag(torch.tensor([30.0, 1.0, 1.0, 1.0]))
    x = torch.randn(4000, 4) * torch.tensor([0.01, 1.0, 1.0, 1.0])
    stats = lr.calibrate(model, [x])

    def kept(units):
        methods, budget = [lr.HiddenUnitsMethod()], lr.Budget(params=0.75)
        plan = lr.make_plan(model, budget, stats, methods, damping=lr.Damping(inputs=1e-6, units=units))
        assert plan["2"].rank == 3
        return lr.factorize_(copy.deepcopy(model), plan, stats)[0].weight[:, 0].any()

    assert not kept(None)
    assert kept(0.03)
