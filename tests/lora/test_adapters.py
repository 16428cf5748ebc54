"""Adapters leave a module what it is, on every kind of layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter

from .peer import second, wrapped

MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), (3, 8)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(8, 6, bias=False)), (2, 4, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 5, padding="same", padding_mode="circular")), (2, 4, 9)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, padding_mode="reflect")),
        (2, 4, 9, 9),
    ),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2, groups=4)), (2, 4, 9, 9)),
    "conv3d (1, 1, k)": (lambda: nn.Sequential(nn.Conv3d(3, 4, (1, 1, 3))), (2, 3, 4, 4, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6, padding_idx=2)), None),
    "lstm": (lambda: nn.LSTM(5, 6, batch_first=True, bidirectional=True), (2, 4, 5)),
    "gru": (lambda: nn.GRU(5, 6, num_layers=2), (4, 2, 5)),
    "low-rank linear": (lambda: nn.Sequential(lr.LowRankLinear(8, 6, rank=3)), (3, 8)),
    "low-rank embedding": (lambda: nn.Sequential(lr.LowRankEmbedding(9, 6, rank=3)), None),
    "tucker": (lambda: nn.Sequential(lr.TuckerConv2d(4, 6, 3, padding=1, groups=2, rank=2)), (2, 4, 7, 7)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), (2, 5, 16)),
    "kdim and vdim": (lambda: CrossAttention(), (2, 5, 16)),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 6)), None),
    "bag, maximum": (lambda: nn.Sequential(nn.EmbeddingBag(9, 6, mode="max")), None),
    "stack": (lambda: Experts(), (3, 2, 6)),
    "low-rank bag": (lambda: nn.Sequential(lr.LowRankEmbeddingBag(9, 6, rank=3)), None),
    "cp": (lambda: nn.Sequential(lr.CPConv1d(4, 6, 3, rank=3)), (2, 4, 9)),
    "low-rank transposed": (lambda: nn.Sequential(lr.LowRankConvTranspose1d(4, 6, 3, rank=2)), (2, 4, 9)),
}
FACTORED = ("low-rank linear", "low-rank embedding", "tucker", "low-rank bag", "cp", "low-rank transposed")
models = pytest.mark.parametrize("name", MODELS)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        return torch.bmm(x, self.up)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x[..., :6], x[..., :4])[0]


def make(name):
    build, shape = MODELS[name]
    x = torch.randint(9, (2, 5)) if shape is None else torch.randn(shape)
    return build().eval(), x


def run(model, x):
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


def everything(name, module):
    return True


def adapted(name, **settings):
    """Adapters on every weight, with a ``B`` that is not zero."""
    model, x = make(name)
    base = run(model, x).detach()
    lr.add_lora_(model, everything, **{"rank": 1 if name == "depthwise" else 2, "alpha": 4, **settings})
    scramble(model)
    return model, x, base


@torch.no_grad()
def scramble(model):
    for module in model.modules():
        if isinstance(module, Adapter):
            module.B.normal_()
            if not module.A.any():  # of an embedding
                module.A.normal_()


@models
def test_a_fresh_adapter_changes_nothing_and_keeps_the_keys(name):
    model, x = make(name)
    base, state, kinds = run(model, x), model.state_dict(), [type(m) for m in model.modules()]
    lr.add_lora_(model, everything, rank=1)
    assert torch.allclose(run(model, x), base, atol=1e-6)
    assert set(state) <= set(model.state_dict())
    assert all(
        isinstance(model.get_submodule(n), k) for (n, _), k in zip(make(name)[0].named_modules(), kinds, strict=True)
    )
    new = {key for key in set(model.state_dict()) - set(state) if not key.endswith((".scaling", ".gate"))}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == new


@models
def test_the_base_state_dict_still_fits(name):
    model, x, _ = adapted(name)
    out = run(model, x)
    other = make(name)[0].state_dict()
    own = {key: model.state_dict()[key].clone() for key in other}
    model.load_state_dict(other, strict=True)
    assert not torch.allclose(run(model, x), out)
    model.load_state_dict(own, strict=True)
    assert torch.equal(run(model, x), out)


@models
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_the_output_is_that_of_the_weight_with_its_delta(name, init):
    model, x, base = adapted(name, init=init)
    out = run(model, x)
    assert not torch.allclose(out, base, atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(run(model, x), out, atol=1e-5)  # torch's fast paths
    plain = lr.remove_lora_(copy.deepcopy(model))
    plain = lr.densify_(plain) if name in FACTORED else plain
    with torch.no_grad():
        for owner, module in model.named_modules():
            for key in getattr(module, "_adapted_names", ()):
                plain.get_submodule(owner).get_parameter(key).copy_(getattr(module, key))
    assert torch.allclose(run(plain, x), out, atol=2e-5)


@models
def test_disabled_is_the_base_and_removed_leaves_no_trace(name):
    model, x, base = adapted(name)
    with lr.lora_disabled(model):
        assert torch.equal(run(model, x), base)
    assert not torch.allclose(run(model, x), base, atol=1e-3)
    lr.remove_lora_(model)
    fresh = make(name)[0]
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(run(model, x), base)
    assert not [key for m in model.modules() for key in m.__dict__ if "lora" in key]


@models
def test_copies_compute_the_same(name):
    model, x, _ = adapted(name)
    out = run(model, x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(clone, x), out)
        scramble(clone)
        assert torch.equal(run(model, x), out)


@models
def test_all_adapter_parameters_learn_and_nothing_else_does(name):
    model, x, _ = adapted(name)
    run(model, x).square().sum().backward()
    parameters = lr.lora_parameters(model)
    assert parameters
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)
    own = {id(p) for p in parameters}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FACTORED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ten_rounds_of_merging_change_no_bit(name, dtype):
    model, _ = make(name)
    lr.add_lora_(model.to(dtype), everything, rank=1, alpha=3)
    scramble(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(10):
        lr.merge_lora_(model)
        assert any(not torch.equal(state[key], value) for key, value in model.named_parameters())
        lr.unmerge_lora_(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FACTORED])
def test_merged_computes_the_same(name):
    model, x, _ = adapted(name)
    out = run(model, x)
    lr.merge_lora_(model)
    assert torch.allclose(run(model, x), out, atol=2e-5)


def test_several_adapters_switch_add_up_and_mix_in_a_batch_without_recompiling():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(4, 8)
    base = model(x)
    lr.add_lora_(model, rank=2, name="a", init="pissa")
    assert torch.allclose(model(x), base, atol=1e-6)
    lr.add_lora_(model, rank=3, name="b")
    scramble(model)
    outs = {}
    for name in ("a", "b", None):
        outs[name] = lr.use_adapter(model, name)(x)
    assert torch.equal(outs[None], base)
    names = ["a", "b", None, "a"]
    with lr.lora_rows(lr.use_adapter(model, ["a", "b"]), names):
        mixed = model(x)
        mixed.sum().backward()
    assert torch.allclose(mixed, torch.stack([outs[n][k] for k, n in enumerate(names)]), atol=1e-5)
    assert all(p.grad is not None for p in lr.lora_parameters(model))
    torch._dynamo.reset()
    model.requires_grad_(False)  # as for serving; what learns is part of what is compiled
    compiled = torch.compile(lr.use_adapter(model, "a"), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), outs["a"], atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        lr.use_adapter(model, "b")
        assert torch.allclose(compiled(x), outs["b"], atol=1e-5)
        with lr.lora_disabled(model):
            assert torch.allclose(compiled(x), base, atol=1e-5)


@pytest.mark.parametrize("chosen", [["q_proj"], ["q_proj", "v_proj"], ["self_attn.k_proj", "out_proj"]], ids=str)
def test_the_projections_of_a_fused_attention_are_chosen_separately(chosen, tmp_path):
    model, x = make("encoder layer")
    base, fused = run(model, x), model.self_attn.in_proj_weight.detach().clone()
    lr.add_lora_(model, chosen, rank=2)
    assert torch.allclose(run(model, x), base, atol=1e-6)
    scramble(model)
    out = run(model, x)
    with torch.no_grad():
        assert torch.allclose(run(model, x), out, atol=1e-5)
    changed = (model.self_attn.in_proj_weight != fused).any(1).view(3, -1).all(1).tolist()
    assert changed == [any(name.endswith(part) for name in chosen) for part in ("q_proj", "k_proj", "v_proj")]
    for _ in range(3):
        lr.merge_lora_(model)
        assert torch.allclose(run(model, x), out, atol=1e-5)
        lr.unmerge_lora_(model)
    assert torch.equal(model.self_attn._parameters["in_proj_weight"], fused)
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(clone, x), out)
    with pytest.raises(lr.LowRankError, match="overlaps"):
        lr.add_lora_(model, ["in_proj_weight"], rank=2, name="whole")
    with pytest.raises(lr.UnsupportedLayerError, match="fused attention"):
        lr.save_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    lr.remove_lora_(model)
    assert type(model.self_attn) is nn.MultiheadAttention
    assert torch.equal(run(model, x), base)


BAD = {
    "nothing matches": (lambda m: lr.add_lora_(m, ["q_proj"]), "'q_proj' matches no layer"),
    "a pattern that matches nothing": (lambda m: lr.add_lora_(m, "x.*"), "matches no layer"),
    "a broken pattern": (lambda m: lr.add_lora_(m, "("), "regular expression"),
    "everything excluded": (lambda m: lr.add_lora_(m, exclude=["0", "1"]), "exclude="),
    "an unknown exclusion": (lambda m: lr.add_lora_(m, exclude=["head"]), "exclude= has 'head'"),
    "a rank that is no integer": (lambda m: lr.add_lora_(m, rank=0.5), "ParameterFraction"),
    "rank 0": (lambda m: lr.add_lora_(m, ["0"], rank=0), "rank 0"),
    "an unknown init": (lambda m: lr.add_lora_(m, ["0"], init="magic"), "magic"),
    "a name taken": (lambda m: lr.add_lora_(lr.add_lora_(copy.deepcopy(m), rank=1), rank=1), "already"),
    "an unknown adapter": (lambda m: lr.use_adapter(lr.add_lora_(copy.deepcopy(m), rank=1), "b"), "'b'"),
    "dropout 1": (lambda m: lr.add_lora_(m, dropout=1.0), "dropout"),
    "nothing to merge": (lr.merge_lora_, "no adapters"),
    "nothing merged": (lr.unmerge_lora_, "nothing is merged"),
}


def test_a_fused_attention_is_adapted_whole_or_in_slices_but_not_both():
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval(), torch.randn(2, 5, 16)
    lr.add_lora_(model, ".*", rank=2, init="gaussian")
    assert model.self_attn._adapted_names == ("in_proj_weight",)
    scramble(model)
    assert torch.allclose(model(x), lr.merge_lora_(copy.deepcopy(model), unload=True)(x), atol=1e-5)
    lr.remove_lora_(model)
    with pytest.raises(lr.LowRankError, match=r"'self_attn.in_proj_weight' and a slice of it"):
        lr.add_lora_(model, ["self_attn", "q_proj"], rank=2)
    lr.add_lora_(model, ".*[qv]_proj", rank=2)
    assert model.self_attn._adapted_names == ("q_proj", "v_proj")
    with pytest.raises(lr.LowRankError, match="overlaps with a part of it"):
        lr.add_lora_(model, ["self_attn"], rank=2, name="second")


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_and_change_nothing(case):
    attempt, word = BAD[case]
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    with pytest.raises(lr.LowRankError, match=word):
        attempt(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


def test_merging_a_tied_weight_refuses_or_unties():
    """Merging a tied embedding silently changes the head."""
    model = nn.ModuleDict({"table": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    model["head"].weight = model["table"].weight
    lr.add_lora_(model, ["table"], rank=2)
    scramble(model)
    x = torch.randn(3, 6)
    before, looked_up = model["head"](x), model["table"](torch.arange(9))
    with pytest.raises(lr.LowRankError, match=r"tied to 'head\.weight'"):
        lr.merge_lora_(model)
    lr.merge_lora_(model, ties="untie")
    assert torch.equal(model["head"](x), before)
    assert torch.allclose(model["table"](torch.arange(9)), looked_up, atol=1e-6)


@pytest.mark.parametrize("file", [False, True])
def test_a_later_adapter_leaves_what_learns_as_it_is_like_the_peer(file, tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    theirs, ours = wrapped(copy.deepcopy(base), ["0"]), lr.add_lora_(copy.deepcopy(base), ["0"], rank=4)
    for module in (theirs.base_model.model, ours):
        assert not module[1].weight.requires_grad
        module[1].weight.requires_grad_(True)
    adapter = ours[0].lora_weight.adapters["default"]
    adapter.A.requires_grad_(False)
    if file:
        lr.save_lora(lr.add_lora_(copy.deepcopy(base), ["2"], rank=4), tmp_path)
        theirs.load_adapter(tmp_path, "second")
        lr.load_lora(ours, tmp_path, "second")
    else:
        second(theirs, ["2"])
        lr.add_lora_(ours, ["2"], rank=4, name="second")
    named = theirs.base_model.model.named_parameters()
    learns = {name.replace("base_layer.", ""): parameter.requires_grad for name, parameter in named}
    own = dict(ours.named_parameters())
    for name in base.state_dict():
        assert own[name].requires_grad == learns[name] == (name == "1.weight")
    assert not adapter.A.requires_grad
    assert adapter.B.requires_grad
    lr.remove_lora_(ours)
    assert all(parameter.requires_grad for parameter in ours.parameters())
