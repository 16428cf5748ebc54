"""Another file's values in an adapter that is there: the same tensors, the same shapes, no new compilation."""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.lora.adapter import Adapter

from .peer import known_warnings

if importlib.util.find_spec("torchvision"):
    import_torchvision()  # transformers imports it where it is installed
pytestmark = known_warnings


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 12), nn.Linear(12, 12)
        self.conv, self.head = nn.Conv1d(12, 8, 3, padding=1, groups=2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.conv(self.fc(self.embed(x)).mT).mT)


EVERYTHING = ["embed", "fc", "conv", "head"]


@pytest.fixture
def base():
    return Net()


@torch.no_grad()
def scramble(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(torch.rand_like(parameter) * 0.3) if "magnitude" in name else parameter.normal_(std=0.5)


def saved(base, folder, target=EVERYTHING, **settings):
    """A file, and the model that it was made from."""
    model = lr.add_lora_(copy.deepcopy(base), target, **{"rank": 2, "alpha": 3, **settings})
    scramble(model)
    lr.save_lora(model, folder)
    return model


FILES = {
    "the same rank": {"rank": 3, "alpha": 7},
    "a smaller rank": {"rank": 1, "alpha": 2},
    "another rank for each layer": {"rank": 2, "rank_pattern": {"fc": 1, "embed": 3}},
    "fewer layers": {"target": ["fc"]},
    "rslora": {"rslora": True},
    "a start that is taken off": {"rank": 1, "init": "pissa", "target": ["fc", "embed"]},
}


@pytest.mark.parametrize("case", FILES)
def test_the_values_are_those_of_the_file(base, case, tmp_path):
    other = saved(base, tmp_path, **FILES[case])
    model, x = lr.add_lora_(copy.deepcopy(base), EVERYTHING, rank=3, name="slot"), torch.randint(9, (4, 5))
    scramble(model)
    before = {name: (parameter, parameter.shape, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    assert lr.swap_lora_(model, tmp_path) is model
    assert torch.allclose(model(x), other(x), atol=1e-4)
    for name, parameter in model.named_parameters():
        assert before[name][0] is parameter
        assert before[name][1:] == (parameter.shape, parameter.data_ptr())
    lr.save_lora(model, tmp_path / "again")
    assert torch.allclose(lr.load_lora(copy.deepcopy(base), tmp_path / "again")(x), other(x), atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_magnitudes_biases_and_whole_modules_are_swapped_too(base, dora, tmp_path):
    settings = {"target": ["fc"], "dora": dora, "bias": True, "modules_to_save": ["head"]}
    other = saved(base, tmp_path, **settings)
    model, x = saved(base, tmp_path / "mine", **settings), torch.randint(9, (4, 5))
    assert not torch.allclose(model(x), other(x), atol=1e-2)
    lr.swap_lora_(model, tmp_path)
    assert torch.allclose(model(x), other(x), atol=1e-5)
    with lr.lora_disabled(model):
        assert torch.allclose(model(x), base(x), atol=1e-6)


def test_a_start_has_room_for_a_greater_rank(base, tmp_path):
    other = saved(base, tmp_path, ["fc"], rank=5)
    model, x = saved(base, tmp_path / "mine", ["fc"], rank=3, init="pissa"), torch.randint(9, (4, 5))
    lr.swap_lora_(model, tmp_path)
    assert torch.allclose(model(x), other(x), atol=1e-4)


def test_a_layer_without_values_is_the_base_with_dora_too(base, tmp_path):
    other = saved(base, tmp_path, ["fc"], dora=True)
    model, x = saved(base, tmp_path / "mine", ["fc", "head"], dora=True), torch.randint(9, (4, 5))
    lr.swap_lora_(model, tmp_path)
    assert torch.allclose(model(x), other(x), atol=1e-5)


def test_only_the_named_adapter_changes(base, tmp_path):
    other = saved(base, tmp_path)
    model, x = lr.add_lora_(copy.deepcopy(base), EVERYTHING, rank=3, name="a"), torch.randint(9, (4, 5))
    scramble(model)
    lr.add_lora_(model, EVERYTHING, rank=2, name="b")
    kept = lr.use_adapter(model, "a")(x)
    with pytest.raises(lr.LowRankError, match=r"\['a', 'b'\], expected one"):
        lr.swap_lora_(model, tmp_path)
    lr.swap_lora_(model, tmp_path, "b")
    assert torch.equal(model(x), kept)
    assert torch.allclose(lr.use_adapter(model, "b")(x), other(x), atol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_nothing_is_compiled_again(base, wrapped, tmp_path):
    others = {
        k: saved(base, tmp_path / str(k), rank=k, alpha=2 * k + 1, modules_to_save=["head"], target=EVERYTHING[:3])
        for k in (1, 2, 3)
    }
    others[4] = saved(base, tmp_path / "4", target=["fc"], modules_to_save=["head"])
    model = lr.add_lora_(copy.deepcopy(base), EVERYTHING[:3], rank=3, modules_to_save=["head"])
    counter, x = CompileCounter(), torch.randint(9, (4, 5))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    assert counter.frame_count == 1
    for k, other in others.items():
        lr.swap_lora_(compiled if wrapped else model, tmp_path / str(k))
        assert torch.allclose(compiled(x), other(x), atol=1e-4)
    assert counter.frame_count == 1


def test_a_file_of_peft_and_one_of_kohya(base, tmp_path):
    from .peer import peft, wrapped

    theirs = wrapped(copy.deepcopy(base), ["fc", "head"], r=2, lora_alpha=5)
    theirs.save_pretrained(tmp_path)
    model, x = lr.add_lora_(copy.deepcopy(base), ["fc", "head"], rank=3), torch.randint(9, (4, 5))
    lr.swap_lora_(model, tmp_path)
    assert torch.allclose(model(x), theirs.eval()(x), atol=1e-4)
    assert peft() is not None
    down, up = torch.randn(2, 12), torch.randn(12, 2)
    torch.save({"lora_unet_fc.lora_down.weight": down, "lora_unet_fc.lora_up.weight": up}, tmp_path / "kohya.pt")
    lr.swap_lora_(model, tmp_path / "kohya.pt")
    want = copy.deepcopy(base)
    with torch.no_grad():
        want.fc.weight.add_(up @ down)
    assert torch.allclose(model(x), want(x), atol=1e-4)


BAD = {
    "a greater rank": ({"rank": 3}, {}, r"its rank is 3 for 'embed\.weight', above the adapter's 2"),
    "more layers": ({}, {"target": ["fc"]}, r"adapts 'embed\.weight', where the model has no adapter 'default'"),
    "DoRA": ({"target": ["fc"], "dora": True}, {"target": ["fc"]}, r"it has DoRA for 'fc\.weight'"),
    "no DoRA": ({"target": ["fc"]}, {"target": ["fc"], "dora": True}, r"it has no DoRA for 'fc\.weight'"),
    "a bias": ({"target": ["fc"], "bias": True}, {"target": ["fc"]}, r"it has a bias for 'fc\.weight'"),
    "a head": ({"target": ["fc"], "modules_to_save": ["head"]}, {"target": ["fc"]}, r"it has 'head\.bias' whole"),
    "no head": ({"target": ["fc"]}, {"target": ["fc"], "modules_to_save": ["head"]}, r"it lacks 'head\.bias'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(base, case, tmp_path):
    theirs, ours, word = BAD[case]
    saved(base, tmp_path, **theirs)
    model = saved(base, tmp_path / "mine", **ours)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(lr.CheckpointError, match=word):
        lr.swap_lora_(model, tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    lr.merge_lora_(model)
    with pytest.raises(lr.LowRankError, match="merged"):
        lr.swap_lora_(model, tmp_path)
    with pytest.raises(lr.LowRankError, match="'other'"):
        lr.swap_lora_(lr.unmerge_lora_(model), tmp_path, "other")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_swapped_while_another_one_is_merged(base, dora, tmp_path):
    other, x = saved(base, tmp_path, ["fc"], dora=dora), torch.randint(9, (4, 5))
    model = lr.add_lora_(copy.deepcopy(base), ["fc", "head"], rank=3, dora=dora, name="slot")
    lr.add_lora_(model, ["fc", "head"], rank=2, name="merged")
    scramble(model)
    lr.merge_lora_(lr.use_adapter(model, "merged"))
    out = model(x)
    lr.swap_lora_(model, tmp_path, "slot")
    assert torch.equal(model(x), out)
    with pytest.raises(lr.LowRankError, match=r"adapter 'merged' is merged into 'fc\.weight'"):
        lr.swap_lora_(model, tmp_path, "merged")
    lr.use_adapter(lr.unmerge_lora_(model), "slot")
    assert torch.allclose(model(x), other(x), atol=1e-5)


def test_rows_of_tokens_are_swapped_while_another_adapter_of_the_embedding_is_merged(base, tmp_path):
    other, x = saved(base, tmp_path, ["fc"], trainable_tokens={"embed": [1, 5]}), torch.randint(9, (4, 5))
    model = lr.add_lora_(copy.deepcopy(base), ["fc"], rank=2, name="slot", trainable_tokens={"embed": [1, 5]})
    lr.add_lora_(model, ["embed"], rank=2, name="merged")
    scramble(model)
    out = lr.merge_lora_(lr.use_adapter(model, "merged"))(x)
    lr.swap_lora_(model, tmp_path, "slot")
    assert torch.equal(model(x), out)
    lr.use_adapter(lr.unmerge_lora_(model), "slot")
    assert torch.allclose(model(x), other(x), atol=1e-5)


def test_biases_of_the_base_are_not_swapped(base, tmp_path):
    other = lr.add_lora_(copy.deepcopy(base), ["fc"], rank=2)
    other.fc.bias.requires_grad_(True)
    scramble(other)
    lr.save_lora(other, tmp_path)
    model = lr.add_lora_(base, ["fc"], rank=2)
    with pytest.raises(lr.CheckpointError, match=r"trains 'fc\.bias' of the base"):
        lr.swap_lora_(model, tmp_path)
    assert not any(isinstance(m, Adapter) and m.B.any() for m in model.modules())
