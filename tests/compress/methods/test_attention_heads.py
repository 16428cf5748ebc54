"""Smaller heads as a method of a plan: what is chosen, built, edited, saved and read again."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.compress.hidden_units.problem import unit_problem
from lowrank_layers.layers import is_resized

METHODS = [lr.SVDMethod(), lr.HiddenUnitsMethod(), lr.AttentionHeadsMethod()]
HEADS = METHODS[2:]
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = torch.arange(8 * 24).view(8, 24) * 7 % 60
BATCHES = [{"input_ids": rows} for rows in TOKENS.split(2)]
KEYS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NO_DAMPING = lr.Damping(inputs=0.0, outputs=0.0)


def model_of(kind: str = "Llama", **more: object) -> nn.Module:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval().requires_grad_(False)
    with torch.no_grad():  # sharper attention than at initialization, and biases that are not zero
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.normal_(std=0.25)
    return model.requires_grad_(True)


def calibrated(model: nn.Module, *, loss: bool = True) -> lr.Statistics:
    return lr.calibrate(model, BATCHES, lr.SampledCrossEntropy() if loss else None)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def of_heads(plan: lr.Plan) -> list[lr.Entry]:
    return [entry for entry in plan if entry.method == "attention_heads"]


def planned(model: nn.Module, stats: lr.Statistics, size: int, **more: object) -> lr.Plan:
    """A plan with heads of one size and nothing else."""
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats, HEADS, **more)
    return plan.set_rank("model.layers.0.self_attn.o_proj", size)


@pytest.mark.parametrize("in_sequence", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_all_attentions_take_one_size_and_the_budget_is_kept(kind, in_sequence):
    model = model_of(kind)
    stats = calibrated(model)
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats, HEADS)
    assert {entry.name.rpartition(".")[2] for entry in of_heads(plan)} == KEYS
    assert len(of_heads(plan)) == 8
    assert len({entry.rank for entry in of_heads(plan)}) == 1
    small = lr.factorize_(copy.deepcopy(model), plan, stats, BATCHES if in_sequence else None)
    assert params(small) == plan.after.params <= 0.7 * plan.total.params
    assert small.config.head_dim == of_heads(plan)[0].rank < 16
    assert {type(module) for module in small.modules()} == {type(module) for module in model.modules()}
    assert not any(map(is_resized, small.modules()))
    built = type(small)(small.config).double().eval()
    built.load_state_dict(small.state_dict())
    assert torch.allclose(logits(built), logits(small))


@pytest.mark.parametrize("size", [12, 6])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_without_gradients_one_shot_is_what_reduce_head_dim_leaves(kind, size):
    model = model_of(kind)
    stats = calibrated(model, loss=False)
    plan = planned(model, stats, size, damping=lr.Damping())
    small = lr.factorize_(copy.deepcopy(model), plan, stats)
    other = lr.reduce_head_dim_(copy.deepcopy(model), BATCHES, size)
    assert small.config.to_dict() == other.config.to_dict()
    for (name, own), theirs in zip(small.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(own, theirs, atol=1e-6), name
    assert torch.allclose(logits(small), logits(other), atol=1e-6)


def without_some(model: nn.Module, gone: list[int]) -> nn.Module:
    """Queries and keys without some pairs, and values with ten of their sixteen directions."""
    mix = torch.randn(16, 10).double() @ torch.randn(10, 16).double() / 10
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                for head in projection.weight.view(-1, 16, 32):
                    head[[*gone, *(pair + 8 for pair in gone)]] = 0
            values = layer.self_attn.v_proj.weight
            values.copy_(torch.einsum("de,hen->hdn", mix, values.view(-1, 16, 32)).reshape_as(values))
    return model


@pytest.mark.parametrize("in_sequence", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_heads_without_some_pairs_and_directions_lose_nothing(loss, in_sequence):
    model = without_some(model_of(), [1, 4, 6])
    stats, before = calibrated(model, loss=loss), logits(model)
    plan = lr.make_plan(model, lr.Budget(params=0.82), stats, METHODS, units="absolute", damping=NO_DAMPING)
    assert {entry.rank for entry in of_heads(plan)} == {10}
    assert not [entry for entry in plan if entry.method not in ("attention_heads", "dense")]
    energy = lr.Candidate(
        model.get_submodule("model.layers.1.self_attn.o_proj"), stats["model.layers.1.self_attn.o_proj"]
    ).energy
    assert plan.loss < 1e-5 * energy
    small = lr.factorize_(copy.deepcopy(model), plan, stats, BATCHES if in_sequence else None)
    assert small.config.head_dim == 10
    assert torch.allclose(logits(small), before, atol=1e-4)


def test_at_full_size_nothing_changes():
    model = model_of()
    stats, before, config = calibrated(model), logits(model), model.config.to_dict()
    plan = planned(model, stats, 16)
    assert plan.after.params == plan.total.params
    lr.factorize_(model, plan, stats)
    assert model.config.to_dict() == config
    assert torch.allclose(logits(model), before)
    group = of_heads(plan)[0].group
    losses = group.choices(model, stats, plan.damping).losses(16)
    assert losses == pytest.approx([0.0] * 4, abs=1e-12)


def test_the_predicted_loss_of_values_is_the_weighted_error_of_their_reader():
    model = model_of()
    stats = calibrated(model)
    plan = planned(model, stats, 8)
    group, name = of_heads(plan)[0].group, "model.layers.1.self_attn.o_proj"
    choices = group.choices(model, stats, plan.damping)
    dense = model.get_submodule(name)
    new = group.reduced(name, dense, stats[name], plan.damping, choices.kept(8))
    problem = unit_problem(dense, stats[name].changed(free_bias=False), plan.damping)
    predicted = choices.losses(8)[group.leaders.index(name)]
    assert predicted == pytest.approx(problem.loss(new.weight.detach()), rel=1e-6)
    again = lr.make_plan(model, lr.Budget(params=0.7), stats, HEADS)
    losses = dict(zip(group.leaders, choices.losses(of_heads(again)[0].rank), strict=True))
    assert [entry.loss for entry in of_heads(again)] == pytest.approx([losses.get(e.name, 0) for e in of_heads(again)])


def test_the_predicted_loss_of_keys_is_the_weighted_error_of_what_tells_them_apart():
    """A key's mean shows by as much as it turns; the rows are those that calibration saw."""
    model = model_of("Qwen2")
    stats, name, rows = calibrated(model), "model.layers.1.self_attn.k_proj", []
    layer = model.get_submodule(name)
    with torch.no_grad():
        handle = layer.register_forward_hook(lambda module, args, out: rows.append(out.flatten(0, 1)))
        logits(model)
        handle.remove()
    keys, size = torch.cat(rows), 8
    group = lr.AttentionHeadsMethod(context=1000).find(model, stats)[0]
    choices = group.choices(model, stats, NO_DAMPING)
    projector = choices.kept(size).maps[name.rpartition(".")[0]].key_projector
    angles = model.model.rotary_emb.inv_freq.double()[:, None] * torch.logspace(0, 3, 64).double()
    seen = 1 - angles.cos().mean(1).square() - angles.sin().mean(1).square()
    shown = seen.sqrt().repeat(4) * keys.mean(0)
    apart = torch.cat([keys - keys.mean(0), shown.expand(len(keys), -1)])
    lost = apart - apart @ projector.mT
    weighted = ((lost @ stats[name].gradients) * lost).sum() / len(keys)
    found = choices.losses_alone(size)[group.leaders.index(name)]
    assert found == pytest.approx(float(0.5 * stats[name].positions * weighted), rel=1e-3)
    assert all(a >= b for a, b in zip(choices.losses(size), choices.losses_alone(size), strict=True))


def test_a_plan_is_never_worse_than_without_the_method():
    model = model_of()
    stats = calibrated(model)
    for share in (0.9, 0.6, 0.3):
        budget = lr.Budget(params=share)
        alone, both = (lr.make_plan(model, budget, stats, each, units="absolute") for each in (METHODS[:2], METHODS))
        assert both.loss <= alone.loss * (1 + 1e-9)
        assert both.after.params <= share * both.total.params
        assert len(of_heads(both)) in (0, 8)


def mixed(model: nn.Module, stats: lr.Statistics) -> lr.Plan:
    """A plan with smaller heads beside low-rank layers and hidden units."""
    plan = lr.make_plan(model, lr.Budget(params=0.75), stats, METHODS, units="absolute", damping=NO_DAMPING)
    assert {entry.method for entry in plan} >= {"attention_heads", "svd"}
    return plan


def low_rank(model: nn.Module) -> nn.Module:
    """Heads that can be smaller, and one perceptron of low rank."""
    model = without_some(model, [0, 3, 5])
    with torch.no_grad():
        for layer in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            layer.weight.copy_(torch.randn(48, 3).double() @ torch.randn(3, 32).double() / 4)
    return model


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_folder_with_low_rank_layers_beside_smaller_heads_is_read_again(in_sequence, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = low_rank(model_of())
    stats = calibrated(model)
    plan = mixed(model, stats)
    small = lr.factorize_(copy.deepcopy(model), plan, stats, BATCHES if in_sequence else None)
    assert params(small) == plan.after.params
    small.save_pretrained(tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(logits(again), logits(small))
    lr.save(small, tmp_path / "small.safetensors")
    loaded = lr.load(tmp_path / "small.safetensors", into=type(small)(small.config).double().eval())
    assert torch.allclose(logits(loaded), logits(small))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lr.LowRankError, match="use save_pretrained"):
        lr.load(tmp_path / "small.safetensors", into=model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("in_sequence", [False, True])
def test_a_uniform_plan_leaves_a_folder_that_is_read_without_this_library(in_sequence, tmp_path):
    model = model_of().float()
    stats = calibrated(model)
    plan = lr.make_plan(model, lr.Budget(params=0.5), stats, uniform=True)
    assert {entry.method for entry in plan} == {"attention_heads", "hidden_units"}
    small = lr.factorize_(model, plan, stats, BATCHES if in_sequence else None)
    assert params(small) == plan.after.params <= 0.5 * plan.total.params
    assert not any(map(is_resized, small.modules()))
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] == plan["model.layers.0.self_attn.q_proj"].rank < 16
    assert config["intermediate_size"] == plan["model.layers.0.mlp.down_proj"].rank < 48
    torch.save((TOKENS, logits(small)), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules.update(lowrank_layers=None, torchvision=None)\n"
        "import transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokens, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(tokens).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_measured_attentions_compete_with_measured_layers():
    model = model_of()
    stats = calibrated(model)
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats, METHODS, batches=BATCHES)
    leaders = [f"model.layers.{k}.self_attn.{key}" for k in range(2) for key in ("k_proj", "o_proj")]
    measured = {name: effect for name, effect in plan.effects.items() if name.startswith("attention_heads of ")}
    assert list(measured) == [f"attention_heads of {name}" for name in leaders]
    for name, effect in measured.items():  # as far off as what is measured of the same layer by itself
        assert 0.1 < effect / plan.effects[name.removeprefix("attention_heads of ")] < 10
    again = lr.make_plan(model, lr.Budget(params=0.6), stats, METHODS, effects=plan.effects)
    assert [(e.name, e.method, e.rank) for e in again] == [(e.name, e.method, e.rank) for e in plan]
    assert again.loss == pytest.approx(plan.loss)


def test_plans_are_saved_loaded_and_edited_as_a_whole(tmp_path):
    model = model_of()
    stats = calibrated(model)
    plan = lr.make_plan(model, lr.Budget(params=0.7), stats, [lr.AttentionHeadsMethod(context=64)])
    assert plan["model.layers.0.self_attn.k_proj"].settings["context"] == 64
    plan.save(tmp_path / "plan.json")
    loaded = lr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert "attention_heads" in str(loaded)
    before = loaded.to_json()
    for size in (7, 0, 18):
        with pytest.raises(lr.LowRankError, match="expected a multiple of 2 from 2 to 16"):
            loaded.set_rank("model.layers.1.self_attn.q_proj", size)
    assert loaded.to_json() == before
    loaded.set_rank("model.layers.1.self_attn.q_proj", 6)
    assert {entry.rank for entry in of_heads(loaded)} == {6}
    small = lr.factorize_(copy.deepcopy(model), loaded, stats)
    assert params(small) == loaded.after.params
    assert small.config.head_dim == 6
    loaded.drop("model.layers.1.self_attn.q_proj")
    assert not of_heads(loaded)
    assert loaded.after == loaded.total


def test_refinement_keeps_the_sizes(tmp_path):
    model = low_rank(model_of())
    stats = calibrated(model)
    plan = mixed(model, stats)
    lr.factorize_(model, plan, stats, BATCHES, refine=1)
    assert params(model) == plan.after.params
    lr.save(model, tmp_path / "small.safetensors")
    built = lr.load(tmp_path / "small.safetensors", into=type(model)(model.config).double().eval())
    assert torch.allclose(logits(built), logits(model))


@pytest.mark.parametrize("kind", ["Qwen3", "Cohere"])
def test_other_attentions_are_left_alone(kind):
    """Norms of queries and keys; neighbours that turn with each other."""
    model = model_of(kind, num_attention_heads=2, num_key_value_heads=1)
    stats, before, config = calibrated(model), logits(model), model.config.to_dict()
    assert lr.AttentionHeadsMethod().find(model, stats) == []
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    with pytest.raises(lr.LowRankError, match="none of the planned layers"):
        lr.make_plan(model, lr.Budget(params=0.7), stats, HEADS)


def test_a_skipped_projection_keeps_all_heads():
    model = model_of()
    plan = lr.make_plan(model, lr.Budget(params=0.6), calibrated(model), METHODS, ["model.layers.1.self_attn.q_proj"])
    assert not of_heads(plan)


def test_a_failure_leaves_the_model_bit_identical():
    model = model_of()
    stats = calibrated(model)
    plan = planned(model, stats, 8)
    before, config, outputs = copy.deepcopy(model.state_dict()), model.config.to_dict(), logits(model)
    half = copy.deepcopy(plan)
    name = "model.layers.1.self_attn.v_proj"
    half._entries[name] = copy.deepcopy(plan).drop(name)[name]
    bare = copy.copy(stats)
    bare.example = None
    bad = [*BATCHES, {"inputs_embeds": torch.full((2, 24, 32), float("nan")).double()}]
    for call in (
        lambda: lr.factorize_(model, plan),
        lambda: lr.factorize_(model, plan, bare),
        lambda: lr.factorize_(model, plan, stats, optimizer=torch.optim.SGD(model.parameters())),
        lambda: lr.factorize_(model, half, stats),
        lambda: lr.factorize_(model, plan, stats, bad),
        lambda: lr.factorize_(model, plan, stats, BATCHES, refine=1),  # no stage has a low-rank layer
    ):
        with pytest.raises(lr.LowRankError):
            call()
        assert model.config.to_dict() == config
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.equal(logits(model), outputs)


def test_what_cannot_be_asked_for_is_refused():
    model = model_of()
    stats, budget = calibrated(model), lr.Budget(params=0.7)
    with pytest.raises(lr.LowRankError, match="without statistics"):
        lr.make_plan(model, budget, None, HEADS)
    with pytest.raises(lr.LowRankError, match="expected a number of tokens"):
        lr.make_plan(model, budget, stats, [lr.AttentionHeadsMethod(context=0)])
    with pytest.raises(lr.LowRankError, match="several layers at once"):
        lr.progressive_(model, [0.5], methods=HEADS, data=BATCHES)
    with pytest.raises(lr.LowRankError, match="plan anew"):
        lr.AttentionHeadsMethod().read({"attentions": "all", "count": 16, "context": 8})
    stats.example = None
    with pytest.raises(lr.LowRankError, match="without an example"):
        lr.make_plan(model, budget, stats, HEADS)
