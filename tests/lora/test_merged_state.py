"""What decides an output is in the state dict, or is refused when it is saved: merged weights, choices, scalings."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .peer import scramble as scramble_peer, wrapped
from .test_adapters import FACTORED, MODELS, adapted, everything, make, models, run, scramble

DENSE = [name for name in MODELS if name not in FACTORED]
dense = pytest.mark.parametrize("name", DENSE)


def merged(name, **settings):
    model, x, base = adapted(name, **settings)
    out = run(model, x).detach()
    return lr.merge_lora_(model), x, base, out


UNLOAD = {
    "merge_lora_(unload=True)": lambda m: lr.merge_lora_(m, unload=True),
    "remove_lora_(keep='merged')": lambda m: lr.remove_lora_(m, keep="merged"),
    "after merge_lora_": lambda m: lr.merge_lora_(lr.merge_lora_(m), unload=True),
    "keep after merge_lora_": lambda m: lr.remove_lora_(lr.merge_lora_(m), keep="merged"),
}


@dense
@pytest.mark.parametrize("way", UNLOAD)
def test_unloading_leaves_the_plain_model_with_the_merged_weights(name, way):
    model, x, base = adapted(name)
    out = run(model, x).detach()
    assert UNLOAD[way](model) is model
    plain = make(name)[0]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert not [key for m in model.modules() for key in m.__dict__ if "lora" in key]
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.allclose(run(plain, x), out, atol=2e-5)
    assert not torch.allclose(out, base, atol=1e-3)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("first", [False, True], ids=["separate", "merged"])
def test_a_bias_of_an_adapter_is_unloaded_into_that_of_the_layer(layer, first):
    plain, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    model = lr.add_lora_(copy.deepcopy(plain), rank=2, bias=True)
    if layer == "conv":  # PEFT's adapters of convolutions can have one
        plain, x = nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(3, 4, 9)
        model = lr.add_lora_(copy.deepcopy(plain), everything, rank=2)
        model[0].lora_weight.adapters["default"].bias = nn.Parameter(torch.zeros(6))
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_()
    out = model(x)
    assert not torch.allclose(out, plain(x), atol=1e-2)
    if first:
        lr.merge_lora_(model)
        assert torch.allclose(model(x), out, atol=1e-5)
    lr.merge_lora_(model, unload=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.allclose(model(x), out, atol=1e-5)


def test_a_bias_without_a_place_is_refused_and_nothing_is_merged():
    model, x = nn.Sequential(nn.Linear(8, 6, bias=False)), torch.randn(3, 8)
    lr.add_lora_(model, rank=2, bias=True)
    scramble(model)
    out = model(x)
    with pytest.raises(lr.LowRankError, match=r"'0\.weight' has a bias"):
        lr.merge_lora_(model, unload=True)
    assert torch.equal(model(x), out)
    assert torch.allclose(lr.merge_lora_(model)(x), out, atol=1e-6)


def test_only_the_adapters_in_use_are_unloaded():
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    for name in "ab":
        lr.add_lora_(model, rank=2, name=name)
    scramble(model)
    out = lr.use_adapter(model, "b")(x)
    assert torch.allclose(lr.merge_lora_(model, unload=True)(x), out, atol=1e-6)


@dense
def test_removing_merged_adapters_gives_the_base_to_the_bit(name):
    model, x, base, _ = merged(name)
    lr.remove_lora_(model)
    assert torch.equal(run(model, x), base)
    assert [type(m) for m in model.modules()] == [type(m) for m in make(name)[0].modules()]


def test_removing_one_of_the_merged_adapters_leaves_the_others():
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    for name in "ab":
        lr.add_lora_(model, rank=2, name=name)
    scramble(model)
    expected = lr.use_adapter(model, "b")(x)
    lr.merge_lora_(lr.use_adapter(model, ["a", "b"]))
    assert torch.allclose(lr.remove_lora_(model, "a")(x), expected, atol=1e-6)
    with pytest.raises(lr.LowRankError, match="merged already"):
        lr.merge_lora_(model)
    assert torch.allclose(lr.unmerge_lora_(model)(x), expected, atol=1e-6)
    with pytest.raises(lr.LowRankError, match="leave the name out"):
        lr.remove_lora_(model, "b", keep="merged")
    with pytest.raises(lr.LowRankError, match="keep='both'"):
        lr.remove_lora_(model, keep="both")


def save_state(model, path):
    torch.save(model.state_dict(), path)


@dense
@pytest.mark.parametrize("save", [save_state, lr.save], ids=["state_dict", "lr.save"])
def test_the_state_of_a_merged_model_is_refused(name, save, tmp_path):
    """It would load into a fresh model as if nothing were merged: every key fits."""
    model, x, _, _ = merged(name)
    out = run(model, x)
    with pytest.raises(lr.LowRankError, match=r"merged.*unload=True"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    state = lr.unmerge_lora_(copy.deepcopy(model)).state_dict()
    with pytest.raises(lr.LowRankError, match=r"merged; call unmerge_lora_"):
        model.load_state_dict(state)
    assert torch.equal(run(model, x), out)


@dense
def test_copies_of_a_merged_model_are_merged(name):
    model, x, base, _ = merged(name)
    out = run(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    clones = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for clone in clones:
        assert torch.equal(run(clone, x), out)
        assert torch.equal(run(lr.remove_lora_(clone), x), base)
    assert torch.equal(run(model, x), out)


@dense
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_merged_model_is_moved_to_another_dtype_as_a_whole(name, dtype):
    model, x, _, _ = merged(name)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    assert run(model, x).dtype == dtype
    lr.unmerge_lora_(model)
    numbers = [t for name, t in model.named_buffers() if not name.endswith((".scaling", ".gate"))]
    assert {t.dtype for t in (*model.parameters(), *numbers)} == {dtype}
    base = make(name)[0].state_dict()
    assert run(model, x).dtype == dtype
    lr.remove_lora_(model)
    assert model.state_dict().keys() == base.keys()


def test_a_double_weight_is_merged_in_double():
    model, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(3, 8, dtype=torch.float64)
    lr.add_lora_(model, rank=2, alpha=3)
    scramble(model)
    out = model(x)
    assert torch.allclose(lr.merge_lora_(model)(x), out, atol=1e-14)


# ------------------------------------------------------------------------------------ choices, scalings, parts


@models
def test_a_state_dict_carries_the_adapters_in_use_and_their_scaling(name):
    """A fresh model with another alpha, in which both adapters count, computes the same after loading."""
    model, x = make(name)
    for own in "ab":
        lr.add_lora_(model, everything, rank=1, alpha=3, name=own)
    scramble(model)
    out = run(lr.use_adapter(model, "b"), x)
    fresh = make(name)[0]
    for own in "ba":  # in another order, too
        lr.add_lora_(fresh, everything, rank=1, alpha=1, name=own)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(fresh, x), out)
    learned = {key for key, p in fresh.named_parameters() if p.requires_grad}
    assert learned == {key for key, p in model.named_parameters() if p.requires_grad}
    assert learned
    assert not [key for key in learned if ".a." in key]


def test_a_state_dict_with_half_an_adapter_does_not_fit():
    """PiSSA starts from a product that is taken off; without it in the file the output is another one."""
    saved = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2)
    model = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2, init="pissa")
    with pytest.raises(RuntimeError, match=r"Missing key.*a0.*b0"):
        model.load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*a0"):
        saved.load_state_dict(model.state_dict())


def test_a_state_dict_that_knows_one_of_two_adapters_leaves_the_other():
    saved = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2, name="a")
    model = copy.deepcopy(saved)
    scramble(saved)
    lr.add_lora_(model, rank=2, name="b")
    scramble(model)
    other = model[0].lora_weight.adapters["b"].B.detach().clone()
    model.load_state_dict(saved.state_dict(), strict=True)
    assert torch.equal(model[0].lora_weight.adapters["a"].B, saved[0].lora_weight.adapters["a"].B)
    assert torch.equal(model[0].lora_weight.adapters["b"].B, other)


def test_unloading_is_the_peers():
    plain, x = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 12)
    model = lr.add_lora_(copy.deepcopy(plain), ["0", "2"], rank=4, alpha=8)
    theirs = wrapped(plain, ["0", "2"])
    scramble_peer(theirs)
    with torch.no_grad():
        for own, layer in zip(
            (model[0], model[2]), (theirs.base_model.model[0], theirs.base_model.model[2]), strict=True
        ):
            own.lora_weight.adapters["default"].A.copy_(layer.lora_A["default"].weight)
            own.lora_weight.adapters["default"].B.copy_(layer.lora_B["default"].weight)
    unloaded, expected = lr.merge_lora_(model, unload=True), theirs.merge_and_unload()
    assert list(unloaded.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.allclose(unloaded.state_dict()[key], value, atol=1e-6), key
    assert torch.allclose(unloaded(x), expected(x), atol=1e-5)


# ------------------------------------------------------------------------------------------------ modules_to_save


def headed(names="ab"):
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    for name in names:
        lr.add_lora_(model, ["0"], rank=2, name=name, modules_to_save=["2"])
        with torch.no_grad():
            for parameter in lr.lora_parameters(model, name):
                parameter.normal_()
    return model


@pytest.mark.parametrize("chosen", ["a", "b", None])
@pytest.mark.parametrize("way", ["state_dict", "lr.save"])
def test_a_state_dict_carries_the_copy_in_use(chosen, way, tmp_path):
    model, x = headed(), torch.randn(3, 8)
    out = lr.use_adapter(model, chosen)(x)
    fresh = headed("ba")
    if way == "state_dict":
        fresh.load_state_dict(model.state_dict(), strict=True)
    else:
        lr.save(model, tmp_path / "model.safetensors")
        lr.load(tmp_path / "model.safetensors", into=fresh)
    assert torch.equal(fresh(x), out)
    learned = {key for key, p in fresh.named_parameters() if p.requires_grad}
    assert learned == {key for key, p in model.named_parameters() if p.requires_grad}


def test_a_state_dict_with_a_part_of_a_copy_does_not_fit():
    model, x = headed(), torch.randn(3, 8)
    out, state = model(x), model.state_dict()
    base = {key: value for key, value in state.items() if ".lora_" not in f".{key}"}
    model.load_state_dict(base, strict=True)
    assert torch.equal(model(x), out)
    one = {key: value for key, value in headed("a").state_dict().items() if key in state}
    model.load_state_dict(one, strict=True)
    for missing in ("2.lora_whole.a.bias", "2.lora_whole.active"):
        part = {key: value for key, value in state.items() if key != missing}
        with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
            model.load_state_dict(part, strict=True)


@pytest.mark.parametrize("chosen", ["a", "b", None])
def test_unloading_makes_the_copy_in_use_the_module_itself(chosen):
    model, x = headed(), torch.randn(3, 8)
    out = lr.use_adapter(model, chosen)(x)
    lr.merge_lora_(model, unload=True)
    plain = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.allclose(plain(x), out, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_is_the_same_whether_the_adapters_are_merged_or_not(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(8, 8, 1, groups=2), nn.Linear(8, 4))
    lr.add_lora_(model, ["1", "2"], rank=2, init="gaussian", dora=True, trainable_tokens={"0": [3, 5]})
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.add_(torch.rand_like(parameter))
    lr.save_lora(model, tmp_path / "separate")
    lr.save_lora(lr.merge_lora_(model), tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "separate" / name).read_bytes()
