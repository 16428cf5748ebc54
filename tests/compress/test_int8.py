"""Ranks and bits under one limit on bytes: prices, losses, and what is built."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.data import available, lenet, mnist
from lowrank_layers.compress.int8 import RANKS, int8_options
from lowrank_layers.compress.plan import model_cost
from lowrank_layers.files import read_infos
from lowrank_layers.layers import bits_of, matrices_of

METHODS = [lr.SVDMethod(), lr.PivotMethod()]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(60, 24), nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 32, bias=False), nn.Tanh(), nn.Linear(32, 7)
    ).to(dtype)


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(60, (64, 5)) for _ in range(4)]


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture
def stats(model: nn.Sequential) -> lr.Statistics:
    return lr.calibrate(model, batches(), loss=lr.SampledCrossEntropy())


def candidate(model: nn.Sequential, stats: lr.Statistics, name: str) -> lr.Candidate:
    return lr.Candidate(model[int(name)], stats[name], damping=lr.Damping.default(stats))


def floating(layer: lr.Candidate) -> list:
    return [(method, option) for method in METHODS if method.matches(layer) for option in method.options(layer)]


@pytest.mark.parametrize("name", ["0", "1", "3", "5"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_an_offer_is_what_is_built(model, stats, name, calibrated):
    known = stats if calibrated else None
    plan = lr.make_plan(model, lr.Budget(bytes=1.0), known, METHODS, bits=8)
    layer = candidate(model, stats, name) if calibrated else lr.Candidate(model[int(name)])
    offers = list(int8_options(layer, floating(layer)))
    assert offers[0][0] is None
    for method, option in offers:
        edited = copy.deepcopy(plan).drop(name)
        if method is not None:
            edited.set_rank(name, option.rank, method=method.name)
        edited.set_bits(name, 8)
        assert edited[name].after.bytes == option.cost.bytes
        only = lr.Plan([edited[name]], settings=plan.settings)
        built = lr.factorize_(copy.deepcopy(model), only, known)[int(name)]
        assert lr.layer_cost(built).bytes == option.cost.bytes
        assert lr.layer_cost(built).params == option.cost.params
        loss = layer.problems[0].loss(matrices_of(built.to_dense())[0])
        # between the ranks that were rounded: rounding is random, and all that is left near the full rank
        assert loss == pytest.approx(option.loss_increase, rel=0.2)


def test_the_loss_at_the_ranks_that_are_rounded_is_exact(model, stats):
    layer = candidate(model, stats, "1")
    whole, *offers = int8_options(layer, floating(layer))
    assert [option.rank for _, option in offers] == list(range(1, len(offers) + 1))
    plan = lr.make_plan(model, rank=4, stats=stats, methods=METHODS)
    tried = {round((len(offers) - 1) * k / (RANKS - 1)) for k in range(RANKS)}
    for method, option in [whole, *(offers[k] for k in tried)]:
        plan.drop("1") if method is None else plan.set_rank("1", option.rank, method=method.name)
        built = lr.factorize_(copy.deepcopy(model), plan.set_bits("1", 8), stats)[1]
        loss = layer.problems[0].loss(matrices_of(built.to_dense())[0])
        assert loss == pytest.approx(option.loss_increase, rel=1e-4)


def test_the_bias_makes_up_for_the_mean_of_what_rounding_changes(model, stats):
    plan = lr.make_plan(model, rank=4, stats=stats, methods=METHODS).drop("1").set_bits("1", 8)
    built = lr.factorize_(copy.deepcopy(model), lr.Plan([plan["1"]], settings=plan.settings), stats)
    x = torch.cat([model[0](batch).flatten(0, 1) for batch in batches()])
    assert (built[1](x).mean(0) - model[1](x).mean(0)).abs().max() < 1e-6


@pytest.mark.parametrize("size", [0.26, 0.2, 0.15, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_limit_is_kept_and_the_mix_is_best(size, dtype, tmp_path):
    model = network(dtype)
    stats = lr.calibrate(model, batches(), loss=lr.SampledCrossEntropy())
    size = size if dtype == torch.float32 else 2 * size
    budget = lr.Budget(bytes=size)
    plan = lr.make_plan(model, budget, stats, units="absolute", bits=8)
    assert plan.after.bytes <= size * plan.total.bytes
    try:
        ranks = lr.make_plan(model, budget, stats, units="absolute")
    except lr.BudgetError:
        ranks = None
    assert ranks is None or plan.loss <= ranks.loss * (1 + 1e-9)
    whole = copy.deepcopy(plan)
    for entry in plan:
        whole.drop(entry.name).set_bits(entry.name, 8)
    fits = whole.after.bytes <= size * plan.total.bytes
    losses = [next(int8_options(candidate(model, stats, entry.name), []))[1].loss_increase for entry in plan]
    assert not fits or plan.loss <= sum(losses) * (1 + 1e-9)
    small = lr.factorize_(copy.deepcopy(model), plan, stats)
    path = tmp_path / "small.safetensors"
    lr.save(small, path)
    held = sum(info.nbytes for info in read_infos(path)[1].values())
    assert held == plan.after.bytes == model_cost(small).bytes
    loaded = lr.load(path, into=network(dtype))
    assert torch.equal(loaded(batches()[0]), small(batches()[0]))
    assert {bits_of(each) for each in small if not isinstance(each, nn.Tanh)} >= {8}


def test_without_bits_nothing_changes(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.5), stats)
    assert "bits" not in json.loads(plan.to_json())["entries"][0]
    assert "bits" not in plan.settings
    assert all(entry.bits is None for entry in plan)


def test_a_plan_is_printed_edited_and_read_back(model, stats, tmp_path):
    plan = lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8)
    assert "int8" in str(plan)
    assert f"{len(plan)} in int8" in repr(plan)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan
    read = lr.Plan.from_model(lr.factorize_(copy.deepcopy(model), plan, stats))
    same = ("name", "method", "rank", "bits", "bias")
    assert [[getattr(e, key) for key in same] for e in read] == [[getattr(e, key) for key in same] for e in plan]
    assert [entry.after.bytes for entry in read] == [entry.after.bytes for entry in plan]
    entry = plan.set_rank("1", 3, method="svd")["1"]
    assert (entry.label, entry.rank, entry.loss) == ("svd int8", 3, None)
    assert plan.set_bits("1", None)["1"].after.bytes == lr.layer_cost(lr.LowRankLinear(24, 48, rank=3)).bytes
    assert plan.drop("1")["1"].stays


def test_a_model_that_was_trained_is_rounded_by_its_own_plan(model, stats):
    lr.factorize_(model, lr.make_plan(model, rank=5, stats=stats, methods=METHODS), stats)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    expected = model(batches()[0])
    plan = lr.Plan.from_model(model)
    for entry in plan:
        plan.set_bits(entry.name, 8)
    small = lr.factorize_(lr.densify_(model), plan)
    assert [small[int(entry.name)].rank for entry in plan] == [5] * 4
    assert all(bits_of(small[int(entry.name)]) == 8 for entry in plan)
    assert (small(batches()[0]) - expected).norm() < 0.02 * expected.norm()


def test_a_damaged_plan_is_refused(model):
    text = lr.make_plan(model, lr.Budget(bytes=0.2), bits=8).to_json().replace('"bits": 8', '"bits": 3')
    with pytest.raises(lr.LowRankError, match="bits=3"):
        lr.Plan.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": lr.Budget(params=0.5), "bits": 8}, "limit on bytes"),
        ({"rank": 4, "bits": 8}, "limit on bytes"),
        ({"budget": lr.Budget(bytes=0.5), "bits": 4}, "bits=4"),
        ({"budget": lr.Budget(bytes=0.5), "bits": 8, "allocation": "alds"}, "alds"),
    ],
)
def test_bits_are_refused_where_nothing_chooses_them(model, arguments, message):
    with pytest.raises(lr.LowRankError, match=message):
        lr.make_plan(model, **arguments)


def test_what_cannot_be_rounded_is_not_offered():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(48, 16), nn.Embedding(9, 4, max_norm=1.0))
    plan = lr.make_plan(model, lr.Budget(bytes=0.6), bits=8)
    assert [entry.bits for entry in plan] == [None, 8, None]
    with pytest.raises(lr.LowRankError, match="floating"):
        plan.drop("0").set_bits("0", 8)
    plan.drop("3").set_bits("3", 8)  # the plan does not know of max_norm
    with pytest.raises(lr.LowRankError, match="max_norm"):
        lr.factorize_(model, plan)
    assert all(bits_of(layer) is None for layer in model)


def test_tied_weights_stay_in_floating_point():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False))
    model[2].weight = model[0].weight
    plan = lr.make_plan(model, lr.Budget(bytes=0.9), bits=8)
    assert "tied" in plan.skipped["0"]
    assert [entry.name for entry in plan] == ["1"]
    small = lr.factorize_(model, plan)
    assert small[2].weight is small[0].weight


@pytest.mark.parametrize("rectified", [False, True])
def test_layers_are_built_in_sequence(rectified):
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 7))
    data = [torch.randn(200, 24) for _ in range(4)]
    stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(bytes=0.15), stats, bits=8)
    plan.drop("2").set_bits("2", 8)
    plan.drop("4")
    small = lr.factorize_(copy.deepcopy(model), plan, stats, data=data, rectified=rectified)
    assert [bits_of(small[k]) for k in (0, 2, 4)] == [8, 8, None]
    assert isinstance(small[2], lr.Int8Linear)
    one_shot = lr.factorize_(copy.deepcopy(model), plan, stats)
    x = torch.cat(data)
    errors = [float((each(x) - model(x)).square().mean().detach()) for each in (small, one_shot)]
    assert errors[0] < errors[1]


def test_measured_losses_scale_those_of_int8_too(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.26), stats, bits=8, batches=batches())
    assert plan.settings["units"] == "measured"
    assert plan.after.bytes <= 0.26 * plan.total.bytes
    absolute = lr.make_plan(model, lr.Budget(bytes=0.26), stats, bits=8, units="absolute")
    ratios = {
        entry.name: entry.loss / absolute[entry.name].loss
        for entry in plan
        if (entry.bits, entry.rank, entry.method) == (8, absolute[entry.name].rank, absolute[entry.name].method)
    }
    assert ratios
    assert all(ratio != 1 for ratio in ratios.values())


def test_a_failure_leaves_the_model_as_it_was(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8)
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lr.LowRankError, match="NaN"):
        lr.factorize_(model, plan, stats)
    assert state.keys() == model.state_dict().keys()


def test_it_becomes_dense_again_and_trains(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8)
    small = lr.factorize_(model, plan, stats)
    tokens = batches()[0]
    expected = small(tokens)
    dense = lr.densify_(small)
    assert all(type(each) in (nn.Embedding, nn.Linear, nn.Tanh) for each in dense)
    assert all(p.requires_grad for p in dense.parameters())
    assert torch.allclose(dense(tokens), expected, atol=1e-5)


def test_what_is_in_int8_is_not_planned_again(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.26), stats, bits=8).drop("1").set_bits("1", 8)
    small = lr.factorize_(model, lr.Plan([plan["1"]]))
    again = lr.make_plan(small, lr.Budget(bytes=0.9), bits=8)
    assert "int8" in again.skipped["1"]
    assert again.total == model_cost(small)
    with pytest.raises(lr.LowRankError, match="in int8 already"):
        lr.factorize_(small, lr.Plan([plan["1"]]))


def test_the_optimizer_follows_and_the_rest_is_trained(model, stats):
    optimizer = torch.optim.Adam(model.parameters())
    tokens = batches()[0]
    model(tokens).square().sum().backward()
    optimizer.step()
    plan = lr.make_plan(model, lr.Budget(bytes=0.3), stats, bits=8).drop("5")
    lr.factorize_(model, plan, stats, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = [bits_of(each) and each.state_dict() for each in model]
    teacher = network()
    result = lr.recover_(model, batches(), teacher=teacher, steps=3, optimizer=optimizer)
    assert result is not None
    for each, state in zip(model, before, strict=True):
        for key, value in (state or {}).items():
            assert not key.endswith("codes") or torch.equal(each.state_dict()[key], value)


def test_evaluate_counts_codes_bytes_and_products(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.26), stats, bits=8)
    for entry in plan:
        plan.drop(entry.name).set_bits(entry.name, 8)
    wide = nn.Sequential(lr.Int8Linear(64, 32), nn.ReLU(), lr.Int8Linear(32, 8)).bfloat16()  # with the kernel
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    for small, batch in ((lr.factorize_(network(), plan, stats), batches()[0]), (wide, x)):
        found, dense = (lr.evaluate(each, [batch], repeats=2) for each in (small, lr.densify_(copy.deepcopy(small))))
        assert (found.params, found.macs) == (dense.params, dense.macs)
        assert found.bytes == model_cost(small).bytes < dense.bytes


def test_progressive_refuses_int8(model, stats):
    small = lr.factorize_(model, lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8), stats)
    with pytest.raises(lr.LowRankError, match="int8"):
        lr.progressive_(small, [0.5], 1, data=batches(), teacher=network(), validation=batches())


def test_projections_of_attentions_and_fast_paths(tmp_path):
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()

    model, x = encoder(), torch.randn(3, 6, 32)
    dense = model(x)
    plan = lr.make_plan(model, lr.Budget(bytes=0.35), bits=8)
    small = lr.factorize_(copy.deepcopy(model), plan)
    assert sum(isinstance(each, lr.Int8Linear) for each in small.modules()) >= 8
    assert (small(x) - dense).abs().mean() < 0.2
    assert not torch.equal(small(x), dense)  # eval mode calls the layers
    lr.save(small, tmp_path / "small.safetensors")
    loaded = lr.load(tmp_path / "small.safetensors", into=encoder())
    assert torch.equal(loaded(x), small(x))
    assert torch.allclose(lr.densify_(loaded)(x), small(x), atol=1e-5)


def test_a_file_of_int8_is_not_read_into_other_layers(model, stats, tmp_path):
    plan = lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8).set_rank("1", 4, method="svd")
    lr.save(lr.factorize_(model, plan, stats), tmp_path / "small.safetensors")
    other = lr.factorize_(network(), lr.Plan([plan.set_bits("1", None)["1"]]))
    with pytest.raises(lr.CheckpointError, match="8 bits"):
        lr.load(tmp_path / "small.safetensors", into=other)
    wrong = network()
    wrong[5] = nn.Conv1d(32, 7, 1)
    with pytest.raises(lr.CheckpointError, match="'5'"):
        lr.load(tmp_path / "small.safetensors", into=wrong)


def test_the_meta_device_is_filled(model, stats, tmp_path):
    plan = lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8)
    small = lr.factorize_(copy.deepcopy(model), plan, stats)
    lr.save(small, tmp_path / "small.safetensors")
    with torch.device("meta"):
        blank = copy.deepcopy(model).to("meta")
    assert torch.equal(lr.load(tmp_path / "small.safetensors", into=blank)(batches()[0]), small(batches()[0]))


def test_stages_of_an_int8_model_are_refined(model, stats):
    plan = lr.make_plan(model, lr.Budget(bytes=0.2), stats, bits=8)
    data = batches()
    small = lr.factorize_(copy.deepcopy(model), plan, stats, data=data, refine=1)
    assert any(bits_of(each) for each in small)
    assert small(data[0]).isfinite().all()


@pytest.mark.skipif(not available("lenet_mnist"), reason="no lenet_mnist in LOWRANK_DATA")
@pytest.mark.parametrize("size", [0.15, 0.08])
def test_lenet_keeps_more_at_the_same_bytes(size, tmp_path):
    x, _ = mnist("train")
    x_test, y_test = (each[:2000] for each in mnist("test"))
    data = list(x[:1024].split(256))
    stats = lr.calibrate(lenet(), data, loss=lr.SampledCrossEntropy())
    right = {}
    for bits in (None, 8):
        plan = lr.make_plan(lenet(), lr.Budget(bytes=size), stats, bits=bits)
        model = lr.factorize_(lenet(), plan, stats)
        lr.save(model, tmp_path / "model.safetensors")
        held = sum(info.nbytes for info in read_infos(tmp_path / "model.safetensors")[1].values())
        assert held == plan.after.bytes <= size * plan.total.bytes
        right[bits] = (model(x_test).argmax(1) == y_test).float().mean().item()
    assert right[8] > right[None]
