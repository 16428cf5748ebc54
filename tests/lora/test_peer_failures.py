"""What PEFT gets wrong on plain modules, each case by its name (measured on PEFT 0.21).

Where PEFT is installed, its own answer stands beside ours, so that what is said about it is checked.
"""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter

from .peer import scramble, second, wrapped

TIGHT = 1e-5


def everything(name, module):
    return True


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def adapted(model: nn.Module, target=everything, **settings) -> nn.Module:
    """With a delta that is not zero."""
    lr.add_lora_(model, target, **{"rank": 4, "alpha": 8, **settings})
    scramble(model)
    return model


def formed(module: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain module with our base and our delta in its weights: the answer by definition."""
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for key in module._adapted_names:
            base = module._parameters[key]
            bank = getattr(module, f"lora_{key}")
            delta = sum(adapter.delta(bank.layout) for adapter in bank)
            plain.get_parameter(key).copy_(base + delta)
    return plain


def merged_error(theirs, x: torch.Tensor) -> float:
    """How far merging moves PEFT's output."""
    out = theirs(x)
    theirs.merge_adapter()
    return relative(theirs(x), out)


# ------------------------------------------------------------------------------------------- silently ignored, or twice


def test_an_encoder_layer_ignores_its_adapters_in_eval():
    """torch's fast path reads the base weights behind the wrapper: in eval the adapters do nothing (#761)."""
    plain, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), torch.randn(2, 5, 16)
    model = adapted(copy.deepcopy(plain))
    trained, base = model.train()(x), plain(x)
    assert relative(trained, base) > 0.1
    with torch.no_grad():
        assert relative(model.eval()(x), trained) < TIGHT
        with lr.lora_disabled(model):
            assert torch.equal(model(x), plain.eval()(x))
    theirs = wrapped(nn.Sequential(copy.deepcopy(plain)), ["linear1", "linear2"])
    assert relative(theirs.train()(x), base) > 0.1
    with torch.no_grad():
        assert relative(theirs.eval()(x), base) < TIGHT


def attention(x: torch.Tensor) -> tuple[nn.ModuleDict, torch.Tensor, torch.Tensor]:
    """An attention, its output, and what enters its output projection."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)}).eval()
    out = model["attention"](x, x, x)[0].detach()
    projection = model["attention"].out_proj
    heads = torch.linalg.solve(projection.weight.detach(), (out - projection.bias.detach()).mT).mT
    return model, out, heads


def share(change: torch.Tensor, once: torch.Tensor) -> float:
    return float((change * once).sum().detach() / once.square().sum().detach())


def test_the_out_proj_delta_is_applied_twice():
    """On nn.MultiheadAttention the delta of out_proj counts twice."""
    x = torch.randn(2, 5, 16)
    model, base, heads = attention(x)
    theirs = copy.deepcopy(model)
    adapted(model, ["out_proj"])
    bank = model["attention"].out_proj.lora_weight
    once = heads @ bank.adapters["default"].delta(bank.layout).mT
    assert share(model["attention"](x, x, x)[0] - base, once) == pytest.approx(1, rel=1e-4)
    wrapper = wrapped(theirs, ["attention"])
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "lora_B" in name and "out_proj" not in name:
                parameter.zero_()
    layer = wrapper.base_model.model["attention"]
    once = heads @ layer.base_layer.out_proj.get_delta_weight("default").mT
    assert share(layer(x, x, x)[0] - base, once) == pytest.approx(2, rel=1e-4)


def test_out_proj_by_name_is_not_applied_at_all():
    """Targeted by name, out_proj is wrapped, but the attention reads its base weight."""
    x = torch.randn(2, 5, 16)
    model, base, _ = attention(x)
    theirs = wrapped(copy.deepcopy(model), ["out_proj"]).base_model.model["attention"]
    adapted(model, ["out_proj"])
    assert relative(model["attention"](x, x, x)[0], base) > 0.1
    assert relative(theirs(x, x, x)[0], base) < TIGHT


# ------------------------------------------------------------------------------------------------------- convolutions


def check_convolution(conv: nn.Module, x: torch.Tensor, **settings) -> None:
    """Unmerged, merged and unmerged again are what the convolution with the delta in its weight gives."""
    model = adapted(nn.Sequential(copy.deepcopy(conv)), **settings)
    expected = formed(model[0], conv)(x)
    assert relative(expected, conv(x)) > 0.1
    assert relative(model(x), expected) < TIGHT
    assert relative(lr.merge_lora_(model)(x), expected) < TIGHT
    assert relative(lr.unmerge_lora_(model)(x), expected) < TIGHT
    with lr.lora_disabled(model):
        assert torch.equal(model(x), conv(x))


@pytest.mark.parametrize("padding", [0, 2])
def test_dilation_crashes(padding):
    """The thin convolution knows no dilation: its output has another size (#3697)."""
    conv, x = nn.Conv2d(4, 6, 3, dilation=2, padding=padding), torch.randn(2, 4, 9, 9)
    check_convolution(conv, x)
    with pytest.raises(RuntimeError, match="size of tensor"):
        wrapped(nn.Sequential(conv), ["0"])(x)


def test_dilation_merges_wrong():
    """With padding='same' the sizes agree, and the merged layer is another one (#3697)."""
    conv, x = nn.Conv2d(4, 6, 3, dilation=2, padding="same"), torch.randn(2, 4, 9, 9)
    check_convolution(conv, x)
    assert merged_error(wrapped(nn.Sequential(conv), ["0"]).eval(), x) > 0.1


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_mode_merges_wrong(mode):
    """The delta is padded with zeros whatever the base does: merging changes the output."""
    conv, x = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), torch.randn(2, 4, 9, 9)
    check_convolution(conv, x)
    assert merged_error(wrapped(nn.Sequential(conv), ["0"]).eval(), x) > 0.1


@pytest.mark.parametrize("groups", [2, 4, 8], ids=["2", "4", "depthwise"])
def test_grouped_convolutions_refuse_or_do_not_merge(groups):
    """A rank that the groups do not divide is refused, and what is taken cannot be merged (#2549)."""
    conv, x = nn.Conv2d(8, 8, 3, groups=groups), torch.randn(2, 8, 9, 9)
    check_convolution(conv, x, rank=1)
    if groups < 8:
        check_convolution(conv, x, rank=2)
    with pytest.raises(ValueError, match="divisible by groups"):
        wrapped(nn.Sequential(copy.deepcopy(conv)), ["0"], r=3)
    theirs = wrapped(nn.Sequential(copy.deepcopy(conv)), ["0"], r=8)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        theirs.merge_adapter()


def test_merging_a_conv3d_with_a_flat_kernel_crashes():
    """A kernel of (1, 1, k) is taken for a pointwise one."""
    conv, x = nn.Conv3d(3, 4, (1, 1, 3)), torch.randn(2, 3, 4, 4, 5)
    check_convolution(conv, x, rank=3)
    with pytest.raises(RuntimeError):
        wrapped(nn.Sequential(conv), ["0"]).merge_adapter()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_unsupported(dims, groups):
    """ConvTranspose is no layer that it knows."""
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    conv, x = cls(4, 6, 3, stride=2, groups=groups, output_padding=1), torch.randn(2, 4, *[5] * dims)
    check_convolution(conv, x, rank=2)
    with pytest.raises(ValueError, match="not supported"):
        wrapped(nn.Sequential(conv), ["0"])


# ------------------------------------------------------------------------------------------------------ shared weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight


def test_merging_a_tied_embedding_changes_the_head():
    """The head has the same parameter, and gets a delta that nobody asked for (#2018)."""
    x, indices = torch.randn(3, 6), torch.arange(9)
    model = adapted(Tied(), ["table"])
    head, table, weight = model.head(x), model.table(indices), model.head.weight.detach().clone()
    with pytest.raises(lr.LowRankError, match=r"tied to 'head\.weight'"):
        lr.merge_lora_(model)
    assert torch.equal(model.head.weight, weight)
    lr.merge_lora_(model, ties="untie")
    assert torch.equal(model.head(x), head)
    assert relative(model.table(indices), table) < TIGHT
    theirs = wrapped(Tied(), ["table"])
    before = theirs.base_model.model.head(x)
    theirs.merge_adapter()
    assert relative(theirs.base_model.model.head(x), before) > 0.1


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.rest = nn.ModuleList([self.first])

    def forward(self, x):
        return self.rest[0](self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("target", [["first"], ["second"], ["rest.0"], "all-linear"], ids=str)
def test_a_module_under_two_names_gets_one_adapter(target):
    """Only the first of its names is wrapped; at the others the layer is the plain one, and the tie is gone."""
    model, x = TwoNames(), torch.randn(3, 6)
    adapted(model, target)
    assert model.first is model.second is model.rest[0]
    assert len([m for m in model.modules() if isinstance(m, Adapter)]) == 1
    layer = formed(model.first, nn.Linear(6, 6).requires_grad_(False))
    layer.bias = model.first.bias
    assert relative(model(x), layer(layer(layer(x).tanh()).tanh())) < TIGHT
    lr.remove_lora_(model)
    assert model.first is model.second is model.rest[0]
    assert type(model.first) is nn.Linear


def test_a_module_under_two_names_comes_apart_at_the_peer():
    """See above for ours."""
    theirs = wrapped(TwoNames(), ["first", "second"]).base_model.model
    assert theirs.first is not theirs.second
    assert type(theirs.second) is nn.Linear


# --------------------------------------------------------------------------------------------------------------- PiSSA


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_disabling_pissa_is_not_the_base(init):
    """The base weight loses its leading triplets for good: without the adapter the model is the residual (#2184)."""
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(3, 16)
    theirs, base = wrapped(copy.deepcopy(model), ["0"], scrambled=False, init_lora_weights=init), model(x)
    weight = model[0].weight.detach().clone()
    lr.add_lora_(model, rank=4, alpha=8, init=init)
    assert relative(model(x), base) < TIGHT
    scramble(model)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model[0]._parameters["weight"], weight)
    assert torch.equal(lr.remove_lora_(model)(x), base)
    with theirs.disable_adapter():
        assert relative(theirs(x), base) > 0.1


def test_a_second_pissa_adapter_corrupts_the_first():
    """It takes its triplets off the base that the first one relies on (#2184)."""
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(3, 16)
    theirs = wrapped(copy.deepcopy(model), ["0"], scrambled=False, init_lora_weights="pissa")
    adapted(model, rank=4, init="pissa", name="one")
    first = model(x)
    lr.add_lora_(model, rank=4, init="pissa", name="two")
    assert relative(lr.use_adapter(model, "one")(x), first) < TIGHT
    assert relative(lr.use_adapter(model, ["one", "two"])(x), first) < TIGHT
    before = theirs(x)
    second(theirs, ["0"], init_lora_weights="pissa")
    assert relative(theirs(x), before) > 0.1


# ----------------------------------------------------------------------------------------------------- keeping the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ten_merge_rounds_change_bits(dtype):
    """Subtracting the delta again rounds: after ten rounds a third of the bf16 weights are others (#1388, #2502)."""
    model = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    theirs, weight = copy.deepcopy(model), model[0].weight.detach().clone()
    adapted(model)
    for _ in range(10):
        assert not torch.equal(lr.merge_lora_(model)[0]._parameters["weight"], weight)
        lr.unmerge_lora_(model)
    assert torch.equal(model[0]._parameters["weight"], weight)
    theirs = wrapped(theirs, ["0"])
    for _ in range(10):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    changed = (theirs.base_model.model[0].base_layer.weight != weight).float().mean()
    assert float(changed) > 0.1


def test_the_base_state_dict_no_longer_fits():
    """Every key is renamed to base_layer: what was saved before cannot be loaded (#2945)."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(3, 8)
    theirs = copy.deepcopy(model)
    state, base = copy.deepcopy(model.state_dict()), model(x)
    adapted(model)
    out = model(x)
    for parameter in (model[0]._parameters["weight"], model[2]._parameters["bias"]):
        parameter.data.zero_()
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(x), out)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base)
    wrapped(theirs, ["0", "2"])
    with pytest.raises(RuntimeError, match="base_layer"):
        theirs.load_state_dict(state, strict=True)


def test_rank_64_on_a_4x4_layer_is_accepted():
    """Sixteen times the parameters of the layer, without a word."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"'0\.weight' to 4"):
        ours = lr.add_lora_(copy.deepcopy(model), rank=64)
    assert sum(p.numel() for p in lr.lora_parameters(ours)) == 32
    theirs = wrapped(model, ["0"], r=64)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == 512


def test_combined_rslora_adapters_are_scaled_once_more():
    """The new adapter is given alpha = r, which rsLoRA divides by sqrt(r): the sum is sqrt(r) times too large."""
    model, x = nn.Sequential(nn.Linear(16, 12)), torch.randn(3, 16)
    theirs = copy.deepcopy(model)
    adapted(adapted(model, name="a", rslora=True), name="b", rslora=True)
    out = lr.use_adapter(model, ["a", "b"])(x)
    lr.combine_lora_(model, {"a": 1.0, "b": 1.0}, "c", how="cat")
    assert relative(model(x), out) < TIGHT
    theirs = wrapped(theirs, ["0"], use_rslora=True)
    second(theirs, ["0"], use_rslora=True)
    scramble(theirs)
    theirs.add_weighted_adapter(["default", "second"], [1.0, 1.0], "c", "cat")
    layer = theirs.base_model.model[0]
    total = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert relative(layer.get_delta_weight("c"), 8**0.5 * total) < TIGHT


# ----------------------------------------------------------------------------------------------- recompiles, mixed rows


def both_ways(model: nn.Module, x: torch.Tensor) -> nn.Module:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), model(x)) < TIGHT
    return compiled


@torch.no_grad()
def half_the_scale(model):
    for module in model.modules():
        if isinstance(module, Adapter):
            module.scaling.mul_(0.5)


CHANGES = {
    "switching": (lambda m: lr.use_adapter(m, "b"), lambda p: p.set_adapter("second")),
    "both": (lambda m: lr.use_adapter(m, ["a", "b"]), lambda p: p.base_model.set_adapter(["default", "second"])),
    "none": (lambda m: lr.use_adapter(m, None), lambda p: p.base_model.disable_adapter_layers()),
    "the scale": (half_the_scale, lambda p: p.base_model.model[0].scale_layer(0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_recompiles(change):
    """Its adapters, scales and flags are python values that the compiled code is guarded on, for serving too."""
    ours, their = CHANGES[change]
    plain, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(4, 8)
    model = adapted(adapted(copy.deepcopy(plain), name="a"), name="b").requires_grad_(False)
    compiled = both_ways(lr.use_adapter(model, "a"), x)
    before = model(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        ours(model)
        assert relative(compiled(x), model(x)) < TIGHT
    assert relative(model(x), before) > 0.01

    theirs = wrapped(plain, ["0", "2"])
    second(theirs, ["0", "2"])
    torch._dynamo.reset()
    compiled = torch.compile(theirs, backend="aot_eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)
        their(theirs)
        with pytest.raises(RuntimeError, match="recompile"):
            compiled(x)


def test_every_merge_recompiles():
    """Ours compiles once more, for the shorter merged code; every later round finds both."""
    plain, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(4, 8)
    model = adapted(copy.deepcopy(plain))
    compiled = both_ways(model, x)
    out = model(x)
    assert relative(both_compiled(compiled, lr.merge_lora_(model), x), out) < TIGHT
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            assert relative(both_compiled(compiled, lr.unmerge_lora_(model), x), out) < TIGHT
            assert relative(both_compiled(compiled, lr.merge_lora_(model), x), out) < TIGHT


def both_compiled(compiled: nn.Module, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    got = compiled(x)
    assert relative(got, model(x)) < TIGHT
    return got


def test_mixed_batches_refuse_to_train():
    """adapter_names is for inference only: in training mode it is refused."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(4, 8)
    theirs = copy.deepcopy(model)
    adapted(adapted(model, name="a", rank=2), name="b", rank=3)
    rows, outs = ["a", "b", None, "a"], {}
    parameters = lr.lora_parameters(model)
    for k, name in enumerate(rows):
        outs[k] = lr.use_adapter(model, name)(x[k : k + 1])
        if name is not None:
            outs[k].square().sum().backward()
    gradients = [p.grad for p in parameters]
    model.zero_grad()
    lr.use_adapter(model, ["a", "b"])
    with lr.lora_rows(model.train(), rows):
        mixed = model(x)
        mixed.square().sum().backward()
    assert relative(mixed, torch.cat(list(outs.values()))) < TIGHT
    for parameter, expected in zip(parameters, gradients, strict=True):
        assert relative(parameter.grad, expected) < TIGHT
    wrapper = wrapped(theirs, ["0", "2"])
    second(wrapper, ["0", "2"])
    with pytest.raises(ValueError, match="training mode"):
        wrapper.train()(x, adapter_names=["default", "second", "__base__", "default"])


def test_mixed_batches_are_a_loop_over_the_adapters():
    """One pair of products and one gather and scatter for each; ours is one pair for all."""

    def products(model, x, **rows):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x, **rows)
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))

    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(8, 8)
    theirs = wrapped(copy.deepcopy(model), ["0"], r=1)
    for k in range(8):
        adapted(model, name=str(k), rank=1)
    for k in range(7):
        second(theirs, ["0"], str(k), r=1)
    with torch.no_grad(), lr.lora_rows(model, [str(k) for k in range(8)]):
        assert products(model, x) <= 3
    with torch.no_grad():
        rows = ["default", *map(str, range(7))]
        assert products(theirs.eval(), x, adapter_names=rows) >= 16
