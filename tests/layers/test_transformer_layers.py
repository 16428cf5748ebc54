"""Torch's transformer layers once their attentions and linear layers are low-rank.

In eval mode without gradients torch's encoder layers read the weights of their children and skip the children's
forward: a converted model must give the factored output there as everywhere, not the dense one and not an error.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lowrank_layers as lr

from ..contracts.tables import relative

SIZE, HEADS, HIDDEN, LENGTH, SOURCE, BATCH = 16, 2, 24, 5, 6, 3
TIGHT = 1e-5

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors is in prototype stage"
)


@dataclass(frozen=True)
class Row:
    """A module of torch, with its settings.

    Args:
        kind: name of one of the builders below.
        settings: of the layers.
    """

    kind: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return "-".join([self.kind, *(f"{key}={value}" for key, value in self.settings.items())])

    def build(self, **more: Any) -> nn.Module:
        torch.manual_seed(7)
        model = BUILDERS[self.kind]({"dropout": 0.0, "dim_feedforward": HIDDEN, **self.settings, **more})
        with torch.no_grad():  # torch starts biases at zero and norms at one, where a wrong one would not show
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Arguments; the padding is at the end of the last sample, which :meth:`visible` leaves out."""
        torch.manual_seed(8)
        lead = [(BATCH, n) if self.settings.get("batch_first") else (n, BATCH) for n in (LENGTH, SOURCE)]
        x, source = (torch.randn(*each, SIZE) for each in lead)
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padding[-1, -2:] = True
        if self.kind.startswith("Encoder"):
            return {"src": x, "src_key_padding_mask": padding}
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        if self.kind.startswith("Decoder"):
            return {"tgt": x, "memory": source, "tgt_mask": causal, "tgt_is_causal": True}
        return {"src": source, "tgt": x, "tgt_mask": causal, "tgt_is_causal": True}

    def visible(self, out: Tensor) -> Tensor:
        """What is no padding, where torch may write zeros."""
        if not self.kind.startswith("Encoder"):
            return out
        out = out if self.settings.get("batch_first") else out.transpose(0, 1)
        return out.masked_select(~self.inputs()["src_key_padding_mask"][..., None])


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "EncoderLayer": lambda settings: nn.TransformerEncoderLayer(SIZE, HEADS, **settings),
    "Encoder": lambda settings: nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, **settings), 2),
    "DecoderLayer": lambda settings: nn.TransformerDecoderLayer(SIZE, HEADS, **settings),
    "Decoder": lambda settings: nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, **settings), 2),
    "Transformer": lambda settings: nn.Transformer(SIZE, HEADS, 1, 1, **settings),
}
ROWS = [
    Row(kind, {"norm_first": norm_first, "activation": activation, "batch_first": batch_first})
    for kind, norm_first, activation, batch_first in product(BUILDERS, [False, True], ["relu", "gelu"], [False, True])
]
FAST = [row for row in ROWS if row.kind.startswith("Encoder") and row.settings["batch_first"]]
"""Those for which torch has a fast path (the stack only with the norm last)."""
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
fast_rows = pytest.mark.parametrize("row", FAST, ids=lambda row: row.name)
kinds = pytest.mark.parametrize(
    "row", [Row(kind, {"batch_first": True}) for kind in BUILDERS], ids=lambda row: row.kind
)

PARTS: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "linear1": lambda name: name.endswith("linear1"),
    "linear2": lambda name: name.endswith("linear2"),
    "feed-forward": lambda name: "linear" in name,
    "attention": lambda name: "attn" in name,
    "out_proj": lambda name: name.endswith("self_attn.out_proj"),
}
parts = pytest.mark.parametrize("part", PARTS)


def factorized(model: nn.Module, part: str = "everything", **kwargs: Any) -> nn.Module:
    """The model with rank 2 in that part of it."""
    chosen = PARTS[part]
    plan = lr.make_plan(model, rank=2, skip=[] if part == "everything" else [lambda name, _: not chosen(name)])
    assert [entry.name for entry in plan]
    assert all(chosen(entry.name) for entry in plan)
    return lr.factorize_(model, plan, **kwargs)


def densified(model: nn.Module) -> nn.Module:
    return lr.densify_(copy.deepcopy(model))


def modes(model: nn.Module, others: list[nn.Module]) -> Any:
    """Train and eval, with and without gradients."""
    for training, context in product([True, False], [torch.enable_grad, torch.no_grad, torch.inference_mode]):
        for module in (model, *others):
            module.train(training)
        with context():
            yield f"{'train' if training else 'eval'}, {context.__name__}"


class Spy:
    """How often torch's fused encoder layer ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        original = torch._transformer_encoder_layer_fwd

        def counting(*args: Any) -> Tensor:
            self.calls += 1
            return original(*args)

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counting)


# ------------------------------------------------------------------------------------------------- the same function


@rows
@parts
def test_the_output_is_the_factored_one_in_every_mode(row, part):
    model = row.build()
    dense = copy.deepcopy(model)
    factorized(model, part)
    multiplied = densified(model)
    x = row.inputs()
    for mode in modes(model, [dense, multiplied]):
        got = row.visible(model(**x))
        assert bool(got.isfinite().all()), mode
        assert relative(got, row.visible(multiplied(**x))) < TIGHT, mode
        assert relative(got, row.visible(dense(**x))) > 1e-3, mode  # the factors took part


@rows
def test_at_full_rank_the_output_is_the_dense_one_in_every_mode(row):
    model = row.build()
    dense = copy.deepcopy(model)
    lr.factorize_(model, lr.make_plan(model, rank=10_000))
    x = row.inputs()
    for mode in modes(model, [dense]):
        assert relative(row.visible(model(**x)), row.visible(dense(**x))) < TIGHT, mode


@fast_rows
@parts
def test_without_a_padding_mask_too(row, part):
    model = factorized(row.build(), part)
    multiplied = densified(model)
    x = row.inputs()["src"]
    for mode in modes(model, [multiplied]):
        assert relative(model(x), multiplied(x)) < TIGHT, mode


@rows
def test_gradients_reach_every_factor(row):
    model = factorized(row.build())
    model(**row.inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a bias that moves all scores alike changes nothing
        assert bool(parameter.grad.abs().sum() > 0) or name.endswith("k_proj.up.bias"), name


@pytest.mark.parametrize("part", ["linear1", "feed-forward"])
def test_the_fast_path_would_give_the_same_of_a_layer_put_in_by_hand(part):
    """Whoever reads ``layer.weight`` gets the product of the factors."""
    row = FAST[0]
    model = row.build().eval()
    for name in ("linear1", *(["linear2"] if part != "linear1" else [])):
        setattr(model, name, lr.LowRankLinear.from_dense(getattr(model, name), rank=2))
    with torch.no_grad():
        assert relative(row.visible(model(**row.inputs())), row.visible(densified(model)(**row.inputs()))) < TIGHT


@pytest.mark.parametrize("stacked", [False, True])
def test_an_attention_put_in_by_hand_leaves_the_fast_path(stacked):
    row = Row("Encoder" if stacked else "EncoderLayer", {"batch_first": True})
    model = Row("EncoderLayer", {"batch_first": True}).build()
    model.self_attn = lr.LowRankMultiheadAttention.from_dense(model.self_attn, rank=2)
    model = nn.TransformerEncoder(model, 2) if stacked else model
    multiplied = densified(model)
    for mode in modes(model, [multiplied]):
        assert relative(row.visible(model(**row.inputs())), row.visible(multiplied(**row.inputs()))) < TIGHT, mode


def test_an_attention_put_by_hand_into_a_finished_stack_leaves_the_fast_path():
    """A stack makes nested tensors of padded batches, but not where a weight that it reads is a product of factors."""
    row = Row("Encoder", {"batch_first": True})
    model = row.build().eval()
    for layer in model.layers:
        layer.self_attn = lr.LowRankMultiheadAttention.from_dense(layer.self_attn, rank=2)
    with torch.no_grad():
        assert relative(row.visible(model(**row.inputs())), row.visible(densified(model)(**row.inputs()))) < TIGHT


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_layer_of_a_stack(which):
    row = Row("Encoder", {"batch_first": True})
    model = row.build()
    dense = copy.deepcopy(model)
    lr.factorize_(model, lr.make_plan(model, rank=2, skip=[f"layers.{1 - which}"]))
    multiplied = densified(model)
    assert isinstance(model.layers[1 - which].self_attn, nn.MultiheadAttention)
    x = row.inputs()
    for mode in modes(model, [dense, multiplied]):
        assert relative(row.visible(model(**x)), row.visible(multiplied(**x))) < TIGHT, mode
        assert relative(row.visible(model(**x)), row.visible(dense(**x))) > 1e-3, mode


# --------------------------------------------------------------------------------------------------- the fast path


@fast_rows
@parts
def test_the_factored_children_are_called_and_their_weight_is_not_multiplied_out(row, part, monkeypatch):
    """Not by a forward hook, which would itself keep torch off its fast path."""
    model = factorized(row.build(), part).eval()
    x = row.inputs()
    calls: Counter[nn.Module] = Counter()
    original = lr.LowRankLinear.forward

    def counting(self: lr.LowRankLinear, input: Tensor) -> Tensor:
        calls[self] += 1
        return original(self, input)

    def product_of_the_factors(self: lr.LowRankLinear) -> Tensor:
        raise AssertionError("the weight was multiplied out")

    monkeypatch.setattr(lr.LowRankLinear, "forward", counting)
    monkeypatch.setattr(lr.LowRankLinear, "weight", property(product_of_the_factors))
    with torch.no_grad():
        model(**x)
    assert dict(calls) == {module: 1 for module in model.modules() if isinstance(module, lr.LowRankLinear)}


@fast_rows
def test_densify_gives_the_fast_path_back(row, monkeypatch):
    model = row.build().eval()
    before = [dict(vars(module)) for module in model.modules() if "Encoder" in type(module).__name__]
    spy = Spy(monkeypatch)
    x = row.inputs()
    with torch.no_grad():
        expected = model(**x)
        per_call = spy.calls
        assert per_call == len([m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)])
        factorized(model)
        model(**x)
        assert spy.calls == per_call
        lr.densify_(model)
        got = model(**x)
    assert spy.calls == 2 * per_call
    assert got.shape == expected.shape
    after = [vars(module) for module in model.modules() if "Encoder" in type(module).__name__]
    for old, new in zip(before, after, strict=True):
        assert new.keys() == old.keys()
        for flag in ("activation_relu_or_gelu", "use_nested_tensor", "enable_nested_tensor"):
            assert new.get(flag) == old.get(flag), flag


@fast_rows
def test_a_copy_of_the_factored_model_gets_its_fast_path_back_too(row, monkeypatch):
    model = factorized(row.build()).eval()
    spy = Spy(monkeypatch)
    with torch.no_grad():
        densified(model)(**row.inputs())
        assert spy.calls > 0
        spy.calls = 0
        model(**row.inputs())
        assert spy.calls == 0


def test_an_activation_of_ones_own_stays_off_the_fast_path():
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, HIDDEN, activation=torch.tanh, batch_first=True)
    assert layer.activation_relu_or_gelu == 0
    lr.densify_(factorized(layer))
    assert layer.activation_relu_or_gelu == 0


@fast_rows
def test_planning_and_calibrating_leave_the_fast_path_on(row, monkeypatch):
    model = row.build().eval()
    with torch.no_grad():
        expected = model(**row.inputs())
    spy = Spy(monkeypatch)
    stats = lr.calibrate(model, [row.inputs()])
    assert spy.calls == 0  # calibration sees every layer
    lr.make_plan(model, lr.Budget(params=0.5), stats=stats)
    with torch.no_grad():
        assert torch.equal(model(**row.inputs()), expected)
    assert spy.calls > 0


# -------------------------------------------------------------------------------------------------- plan, save, load


@kinds
def test_every_projection_is_planned_by_its_name(row):
    model = row.build()
    plan = lr.make_plan(model, rank=2)
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    expected = {f"{name}.{part}" for name in attentions for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    expected |= {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {entry.name for entry in plan} == expected
    assert plan.skipped == {}
    assert plan.total.params == sum(p.numel() for p in model.parameters())
    lr.factorize_(model, plan)
    assert plan.after.params == sum(p.numel() for p in model.parameters())


@kinds
@pytest.mark.parametrize("part", ["everything", "attention", "linear1", "out_proj"])
def test_the_plan_is_read_back_off_the_model_and_from_its_file(row, part, tmp_path):
    model = row.build()
    chosen = PARTS[part]
    plan = lr.make_plan(model, rank=2, skip=[] if part == "everything" else [lambda name, _: not chosen(name)])
    plan.save(tmp_path / "plan.json")
    loaded = lr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    first, second = row.build(), row.build()
    lr.factorize_(first, plan)
    lr.factorize_(second, loaded)
    read = lr.Plan.from_model(first)
    assert {(e.name, e.method, e.rank) for e in read} == {(e.name, e.method, e.rank) for e in plan}
    assert read.total.params == plan.total.params
    assert read.after.params == plan.after.params
    third = lr.factorize_(row.build(), read)
    x = row.inputs()
    assert torch.equal(first(**x), second(**x))
    assert torch.equal(first(**x), third(**x))


@kinds
@pytest.mark.parametrize("part", ["everything", "attention", "linear1", "out_proj"])
def test_save_and_load(row, part, tmp_path):
    model = factorized(row.build(), part).eval()
    lr.save(model, tmp_path / "model.safetensors")
    x = row.inputs()
    with torch.device("meta"):
        empty = BUILDERS[row.kind]({"dropout": 0.0, "dim_feedforward": HIDDEN, **row.settings})
    for into in (row.build(), empty, copy.deepcopy(model)):
        loaded = lr.load(tmp_path / "model.safetensors", into=into).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**x), model(**x))
        assert repr(loaded) == repr(model)
        back = densified(loaded)
        assert repr(back) == repr(row.build())


@kinds
def test_a_file_for_another_model_changes_nothing(row, tmp_path):
    lr.save(factorized(row.build()), tmp_path / "model.safetensors")
    other = BUILDERS[row.kind]({"dim_feedforward": HIDDEN + 4, **row.settings})
    before, modules = copy.deepcopy(other.state_dict()), dict(other.named_modules())
    with pytest.raises(lr.CheckpointError):
        lr.load(tmp_path / "model.safetensors", into=other)
    assert_untouched(other, before, modules)


@kinds
def test_densify_restores_the_structure_and_the_names(row):
    model = row.build()
    names, types = list(model.state_dict()), [type(module) for module in model.modules()]
    lr.densify_(factorized(model))
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == types


@kinds
def test_the_optimizer_follows(row):
    model = row.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = row.inputs()

    def step() -> None:
        optimizer.zero_grad()
        model(**x).square().mean().backward()
        optimizer.step()

    def check() -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        assert set(held) == set(model.parameters())
        assert set(optimizer.state) <= set(held)
        before = copy.deepcopy(model.state_dict())
        step()
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved >= {name for name in before if "weight" in name}

    step()
    factorized(model, optimizer=optimizer)
    check()
    lr.densify_(model, optimizer=optimizer)
    check()


def test_the_groups_of_the_optimizer_stay_apart():
    model = Row("Encoder", {}).build()
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    others = [p for name, p in model.named_parameters() if "self_attn" not in name]
    optimizer = torch.optim.SGD([{"params": attention, "lr": 0.1}, {"params": others, "lr": 0.2}], lr=1.0)
    factorized(model, optimizer=optimizer)
    for rate, inside in ((0.1, True), (0.2, False)):
        group = next(group for group in optimizer.param_groups if group["lr"] == rate)
        expected = {p for name, p in model.named_parameters() if ("self_attn" in name) == inside}
        assert set(group["params"]) == expected
        assert len(group["params"]) == len(expected)


# ------------------------------------------------------------------------------------------------------ calibration


class Classifier(nn.Module):
    """An encoder with a head, on sequences whose entries lie near a few directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, SIZE)
        layer = nn.TransformerEncoderLayer(SIZE, HEADS, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return out


def sequences(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.3, 0.1, 0.1, 0.05, 0.05])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    return (torch.randn(count, 6, 8, generator=generator) * scales) @ turn


def assert_untouched(model: nn.Module, state: dict[str, Tensor], modules: dict[str, nn.Module]) -> None:
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(type(module) is type(modules[name]) for name, module in model.named_modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize("budget", [0.4, 0.6])
def test_calibration_lowers_the_error_at_the_same_budget(budget):
    torch.manual_seed(1)
    model = Classifier().eval()
    batches, held_out = list(sequences(256, 1).split(64)), sequences(256, 2)
    expected = model(held_out)
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    plain = copy.deepcopy(model)
    lr.factorize_(plain, lr.make_plan(plain, lr.Budget(params=budget)))
    plan = lr.make_plan(model, lr.Budget(params=budget), stats=stats)
    assert plan.after.params <= budget * plan.total.params
    weighted = lr.factorize_(copy.deepcopy(model), plan, stats=stats)
    lr.factorize_(model, plan, stats=stats, data=batches)
    errors = [relative(module(held_out), expected) for module in (plain, weighted, model)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[0]
    assert errors[2] < 1.05 * errors[1]


def test_the_statistics_of_every_projection_are_those_of_its_inputs():
    model = Classifier().eval()
    x = sequences(32, 1)
    stats = lr.calibrate(model, [x])
    first = model.encoder.layers[0]
    inside = model.embed(x).detach()
    expected = inside.flatten(0, 1).double()
    for part in ("q_proj", "k_proj", "v_proj"):
        moments = stats[f"encoder.layers.0.self_attn.{part}"].inputs
        assert torch.allclose(moments.mean.double().flatten(), expected.mean(0), atol=1e-4)
    attended = inside + first.self_attn(inside, inside, inside)[0].detach()
    expected = first.norm1(attended).detach().flatten(0, 1).double()
    moments = stats["encoder.layers.0.linear1"].inputs
    assert torch.allclose(moments.mean.double().flatten(), expected.mean(0), atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_calibrating_and_planning_leave_the_model_as_it_was(training):
    model = Classifier().train(training)
    model.encoder.layers[1].eval()
    flags = [module.training for module in model.modules()]
    model.head.weight.requires_grad_(False)
    learns = [p.requires_grad for p in model.parameters()]
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    parameters = list(model.parameters())
    stats = lr.calibrate(model, [sequences(8, 1)], loss=lr.SampledCrossEntropy())
    lr.make_plan(model, lr.Budget(macs=0.5), stats=stats)
    with pytest.raises(lr.BudgetError):
        lr.make_plan(model, lr.Budget(params=0.001))
    assert_untouched(model, before, modules)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == learns
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrong", ["shape", "iterator", "kind", "not finite"])
@pytest.mark.parametrize("loss", [None, lr.SampledCrossEntropy()], ids=["no loss", "loss"])
def test_a_batch_that_raises_in_the_middle_changes_nothing(wrong, loss):
    model = Classifier().train()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    flags = {key: value for module in model.modules() for key, value in vars(module).items() if "nested" in key}

    def batches() -> Any:
        yield sequences(8, 1)
        if wrong == "iterator":
            raise ValueError("the disk is full")
        yield {
            "shape": torch.randn(2, 6, 9),
            "kind": 3,
            "not finite": torch.full((2, 6, 8), float("nan")),
        }[wrong]

    with pytest.raises((ValueError, RuntimeError, lr.LowRankError)):
        lr.calibrate(model, batches(), loss=loss)
    assert_untouched(model, before, modules)
    assert all(module.training for module in model.modules())
    assert {k: v for module in model.modules() for k, v in vars(module).items() if "nested" in k} == flags
    plan = lr.make_plan(model, rank=2)
    with pytest.raises((ValueError, RuntimeError, lr.LowRankError)):
        lr.factorize_(model, plan, data=batches())
    assert_untouched(model, before, modules)
    assert all(module.training for module in model.modules())


def test_an_interrupted_calibration_context_closes_the_attentions():
    model = Classifier()
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())

    def interrupted() -> None:
        with lr.Calibration(model):
            assert isinstance(model.encoder.layers[0].self_attn, lr.LowRankMultiheadAttention)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_untouched(model, before, modules)


# ---------------------------------------------------------------------------------------- shared, tied, hooked...


class Twice(nn.Module):
    """One attention under two names, and a layer of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"attention": first})
        self.second = nn.ModuleDict({"attention": second})
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = x + block["attention"](x, x, x, need_weights=False)[0]
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
def test_an_attention_under_two_names_is_opened_once(calibrated, tmp_path):
    attention = nn.MultiheadAttention(SIZE, HEADS)
    model = Twice(attention, attention)
    x = torch.randn(LENGTH, BATCH, SIZE)
    stats = lr.calibrate(model, [x]) if calibrated else None
    assert model.first["attention"] is model.second["attention"] is attention
    plan = lr.make_plan(model, rank=2, stats=stats)
    assert {e.name for e in plan} == {
        "fc",
        *(f"first.attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
    }
    assert plan.total.params == sum(p.numel() for p in model.parameters())
    lr.factorize_(model, plan, stats=stats, data=[x] if calibrated else None)
    assert model.first["attention"] is model.second["attention"]
    assert model.first["attention"].rank == (2, 2, 2, 2)
    lr.save(model, tmp_path / "model.safetensors")
    other = nn.MultiheadAttention(SIZE, HEADS)
    loaded = lr.load(tmp_path / "model.safetensors", into=Twice(other, other))
    assert torch.equal(loaded(x), model(x))
    assert loaded.first["attention"] is loaded.second["attention"]
    expected = model(x)
    lr.densify_(model)
    assert model.first["attention"] is model.second["attention"]
    assert type(model.first["attention"]) is nn.MultiheadAttention
    assert relative(model(x), expected) < TIGHT


def hooked(attention: nn.MultiheadAttention) -> None:
    attention.register_forward_hook(lambda *_: None)


def hooked_inside(attention: nn.MultiheadAttention) -> None:
    attention.out_proj.register_forward_pre_hook(lambda *_: None)


DERIVED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hooked": (hooked, "hooks"),
    "hooked inside": (hooked_inside, "hooks|reads out_proj.weight itself"),
    "orthogonal": (lambda a: parametrizations.orthogonal(a, "in_proj_weight"), "parametri"),
    "weight-normed inside": (lambda a: parametrizations.weight_norm(a.out_proj), "parametri"),
    "spectral-normed": (lambda a: nn.utils.spectral_norm(a, "in_proj_weight"), "parametri|hooks"),
    "pruned": (lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.3), "parametri|hooks"),
}


@pytest.mark.parametrize(("derive", "why"), DERIVED.values(), ids=DERIVED)
def test_a_hooked_or_computed_attention_stays_dense_with_a_reason(derive, why):
    model = Twice(nn.MultiheadAttention(SIZE, HEADS), nn.MultiheadAttention(SIZE, HEADS))
    derive(model.second["attention"])
    before = model.second["attention"]
    plan = lr.make_plan(model, rank=2)
    assert not [entry for entry in plan if entry.name.startswith("second")]
    assert "second.attention" in plan.skipped
    reasons = [reason for name, reason in plan.skipped.items() if name.startswith("second.attention")]
    assert any(any(word in reason for word in why.split("|")) for reason in reasons), plan.skipped
    x = torch.randn(LENGTH, BATCH, SIZE)
    stats = lr.calibrate(model, [x])
    lr.factorize_(model, lr.make_plan(model, rank=2, stats=stats), stats=stats)
    assert model.second["attention"] is before
    assert isinstance(model.first["attention"], lr.LowRankMultiheadAttention)


def tied_inside(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    second.in_proj_weight = first.in_proj_weight


def tied_outside(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    second.out_proj.weight = first.out_proj.weight


def tied_to_a_layer(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    model.fc.weight = first.out_proj.weight


def shared_child(first: nn.MultiheadAttention, second: nn.MultiheadAttention, model: Twice) -> None:
    second.out_proj = first.out_proj


@pytest.mark.parametrize("tie", [tied_inside, tied_outside, tied_to_a_layer, shared_child])
def test_tied_attentions_stay_tied_and_dense_with_a_reason(tie):
    first, second = nn.MultiheadAttention(SIZE, HEADS), nn.MultiheadAttention(SIZE, HEADS)
    model = Twice(first, second)
    tie(first, second, model)
    size = sum(p.numel() for p in model.parameters())
    plan = lr.make_plan(model, rank=2)
    assert plan.total.params == size  # shared ones once
    assert "tied" in " ".join(plan.skipped.values()), plan.skipped
    lr.factorize_(model, plan)
    assert plan.after.params == sum(p.numel() for p in model.parameters())
    if tie is not tied_to_a_layer:
        assert model.first["attention"] is first
        assert model.second["attention"] is second
    else:
        assert model.fc.weight is model.first["attention"].out_proj.weight


SKIPS: dict[str, list[Any]] = {
    "full name": ["layers.0.self_attn", "layers.1.self_attn"],
    "end of the name": ["self_attn"],
    "type": [nn.MultiheadAttention],
    "predicate": [lambda name, module: isinstance(module, nn.MultiheadAttention)],
    "projections": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_an_attention_is_skipped_by_name_end_type_or_predicate(skip):
    model = Row("Encoder", {}).build()
    plan = lr.make_plan(model, rank=2, skip=skip)
    assert {entry.name for entry in plan} == {f"layers.{k}.linear{j}" for k in (0, 1) for j in (1, 2)}
    lr.factorize_(model, plan)
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)


def test_an_attention_that_is_the_model_itself_is_refused_with_a_remedy():
    with pytest.raises(lr.LowRankError, match=r"wrap it in nn\.Sequential"):
        lr.make_plan(nn.MultiheadAttention(SIZE, HEADS), rank=2)


def test_keys_and_values_of_their_own_width_are_planned():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(SIZE, HEADS, kdim=8, vdim=10, add_bias_kv=True, bias=False)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.attention(q, k, v)[0]
            return out

    model = Cross()
    x = torch.randn(4, 3, SIZE), torch.randn(5, 3, 8), torch.randn(5, 3, 10)
    stats = lr.calibrate(model, [x])
    plan = lr.make_plan(model, lr.Budget(params=0.6), stats=stats)
    lr.factorize_(model, plan, stats=stats, data=[x])
    assert sum(p.numel() for p in model.parameters()) == plan.after.params <= 0.6 * plan.total.params
    expected = model(*x)
    lr.densify_(model)
    assert type(model.attention) is nn.MultiheadAttention
    assert relative(model(*x), expected) < TIGHT
