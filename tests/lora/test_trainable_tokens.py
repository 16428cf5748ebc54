"""Rows of chosen tokens are trained alone: against PEFT, in its files, on tied models."""

import copy
import importlib.util
import json
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

from .peer import known_warnings

if importlib.util.find_spec("torchvision"):
    import_torchvision()  # transformers imports it where it is installed
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = known_warnings
TOKENS = [3, 17, 5]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)

    def forward(self, x):
        return self.head(self.fc(self.embed(x)))


def llama(tied=False):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def run(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    return getattr(out, "logits", out)


@torch.no_grad()
def scramble(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def ids():
    return torch.arange(20).view(2, 10)


def dense(model, base, owners):
    """The base with its rows replaced, as plain weights."""
    want = copy.deepcopy(base)
    with torch.no_grad():
        for owner in owners:
            rows = model.get_submodule(owner).lora_weight.adapters["default"].rows
            weight = nn.Parameter(want.get_submodule(owner).weight.clone())
            weight[TOKENS] += rows
            want.get_submodule(owner).weight = weight
    return want


@pytest.mark.parametrize("tokens", [TOKENS, {"embed": TOKENS}, {"head": TOKENS}, {"embed": TOKENS, "head": TOKENS}])
def test_only_the_rows_learn_and_the_output_is_that_of_changed_rows(tokens):
    base = Net()
    model = lr.add_lora_(copy.deepcopy(base), [], trainable_tokens=tokens)
    owners = ["embed"] if tokens is TOKENS else list(tokens)
    assert torch.allclose(run(model, ids()), run(base, ids()), atol=1e-6)
    assert [tuple(p.shape) for p in lr.lora_parameters(model)] == [(3, 8)] * len(owners)
    scramble(model)
    want = dense(model, base, owners)
    assert torch.allclose(run(model, ids()), run(want, ids()), atol=1e-5)
    others = [k for k in range(20) if k not in TOKENS]
    for owner in owners:
        read = model.get_submodule(owner).weight
        assert torch.equal(read[others], base.get_submodule(owner).weight[others])
    lr.merge_lora_(model)
    assert torch.allclose(run(model, ids()), run(want, ids()), atol=1e-5)
    lr.unmerge_lora_(model)
    with lr.lora_disabled(model):
        assert torch.allclose(run(model, ids()), run(base, ids()), atol=1e-6)


def test_training_moves_the_rows_as_training_the_whole_embedding_would():
    base, x = Net(), ids()
    model = lr.add_lora_(copy.deepcopy(base), [], trainable_tokens=TOKENS)
    whole = copy.deepcopy(base).requires_grad_(False)
    whole.embed.weight.requires_grad_(True)
    for net, parameters in ((model, lr.lora_parameters(model)), (whole, [whole.embed.weight])):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        net(x).square().mean().backward()
        optimizer.step()
    assert torch.allclose(model.embed.weight[TOKENS], whole.embed.weight[TOKENS], atol=1e-6)
    assert not torch.allclose(model.embed.weight[TOKENS], base.embed.weight[TOKENS], atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, {"embed_tokens": TOKENS}, {"lm_head": TOKENS}])
def test_peft_and_we_compute_the_same_and_read_each_others_files(tied, tokens, tmp_path):
    base = llama(tied)
    model = lr.add_lora_(copy.deepcopy(base), ["q_proj"], rank=2, trainable_tokens=tokens)
    assert torch.allclose(run(model, ids()), run(base, ids()), atol=1e-6)
    trained = sum(p.numel() for p in lr.lora_parameters(model))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    theirs = peft.get_peft_model(copy.deepcopy(base), lora)
    assert trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    scramble(model)
    lr.save_lora(model, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(run(read, ids()), run(model, ids()), atol=1e-5)
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lr.load_lora(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(run(back, ids()), run(theirs, ids()), atol=1e-5)
    assert sum(p.numel() for p in lr.lora_parameters(back)) == trained
    lr.save_lora(back, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert torch.allclose(run(again, ids()), run(theirs, ids()), atol=1e-5)
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "ours"), ids()), run(model, ids()), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_alone_without_any_lora_layer(tied, tmp_path):
    base = llama(tied)
    model = lr.add_lora_(copy.deepcopy(base), [], trainable_tokens=TOKENS)
    scramble(model)
    lr.save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(run(theirs, ids()), run(model, ids()), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "theirs"), ids()), run(model, ids()), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("second", [TOKENS, [1]])
def test_peft_files_with_rows_of_embedding_and_head(tied, second, tmp_path):
    base = llama(tied)
    tokens = {"embed_tokens": TOKENS, "lm_head": second}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    theirs = peft.get_peft_model(copy.deepcopy(base), lora)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(run(lr.load_lora(base, tmp_path), ids()), run(theirs, ids()), atol=1e-5)


def test_a_tied_head_sees_the_rows_and_is_parted_on_merging():
    base = llama(tied=True)
    model = lr.add_lora_(copy.deepcopy(base), ["q_proj"], rank=2, trainable_tokens=TOKENS)
    scramble(model)
    rows = model.model.embed_tokens.lora_weight.adapters["default"].rows
    assert model.lm_head.lora_weight.adapters["default"].rows is rows
    assert len({id(p) for p in lr.lora_parameters(model)}) == len(lr.lora_parameters(model)) == 3
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    want = run(model, ids())
    with pytest.raises(lr.LowRankError, match="tied"):
        lr.merge_lora_(model)
    lr.merge_lora_(model, ties="untie")
    assert torch.allclose(run(model, ids()), want, atol=1e-5)


def test_a_tied_plain_model_keeps_its_tie_in_peft_too(tmp_path):
    """PEFT knows of no ties there: the file says the rows of both layers."""
    base = Net()
    base.head.weight = base.embed.weight
    model = lr.add_lora_(copy.deepcopy(base), ["fc"], rank=2, trainable_tokens=TOKENS)
    scramble(model)
    lr.save_lora(model, tmp_path)
    indices = json.loads((tmp_path / "adapter_config.json").read_text())["trainable_token_indices"]
    assert indices == {"embed": TOKENS, "head": TOKENS}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(theirs, ids()), run(model, ids()), atol=1e-5)
    assert torch.allclose(run(lr.load_lora(base, tmp_path), ids()), run(model, ids()), atol=1e-5)


def test_copies_pickles_and_state_dicts_are_whole_and_removal_leaves_no_trace():
    model = lr.add_lora_(Net(), ["fc"], rank=2, trainable_tokens=TOKENS)
    scramble(model)
    out = run(model, ids())
    assert torch.equal(run(copy.deepcopy(model), ids()), out)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), ids()), out)
    assert not any("selection" in key for key in model.state_dict())
    fresh = lr.add_lora_(Net(), ["fc"], rank=2, trainable_tokens=[0, 1, 2])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, ids()), out)
    lr.remove_lora_(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in Net().modules()]


def test_beside_another_adapter_and_row_by_row():
    base, x = Net(), ids()
    model = lr.add_lora_(copy.deepcopy(base), ["embed"], rank=2, name="low")
    lr.add_lora_(model, ["fc"], rank=2, name="rows", trainable_tokens=TOKENS)
    scramble(model)
    with torch.no_grad():
        model.embed.lora_weight.adapters["low"].B.normal_()
    out = {name: run(lr.use_adapter(model, name), x) for name in ("low", "rows")}
    with lr.lora_rows(model, ["rows", "low"]):
        mixed = run(model, x)
    assert torch.allclose(mixed[0], out["rows"][0], atol=1e-5)
    assert torch.allclose(mixed[1], out["low"][1], atol=1e-5)


def test_the_allocator_leaves_rows_alone():
    model = lr.add_lora_(Net(), ["fc"], rank=4, trainable_tokens=TOKENS)
    allocator = lr.LoraRankAllocator(model, rank=2, start=0, stop=1)
    assert list(allocator.ranks()) == ["fc.weight"]


def test_swapped_without_compiling_again(tmp_path):
    base = Net()
    other = lr.add_lora_(copy.deepcopy(base), ["fc"], rank=2, trainable_tokens=TOKENS)
    scramble(other)
    lr.save_lora(other, tmp_path / "a")
    lr.save_lora(lr.add_lora_(copy.deepcopy(base), ["fc"], rank=2), tmp_path / "b")
    model, counter = lr.add_lora_(copy.deepcopy(base), ["fc"], rank=3, trainable_tokens=TOKENS), CompileCounter()
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True)
    run(compiled, ids())
    lr.swap_lora_(model, tmp_path / "a")
    assert torch.allclose(run(compiled, ids()), run(other, ids()), atol=1e-5)
    lr.swap_lora_(model, tmp_path / "b")
    assert torch.allclose(run(compiled, ids()), run(base, ids()), atol=1e-5)
    assert counter.frame_count == 1
    model = lr.add_lora_(copy.deepcopy(base), ["fc"], rank=3, trainable_tokens=[1])
    with pytest.raises(lr.CheckpointError, match=r"trains the tokens \[3, 17, 5\] of 'embed', and .* has \[1\]"):
        lr.swap_lora_(model, tmp_path / "a")


BAD = {
    "an index too high": ({"trainable_tokens": [20]}, "from 0 to 19; resize the embedding"),
    "a negative index": ({"trainable_tokens": [-1]}, "from 0 to 19"),
    "one twice": ({"trainable_tokens": [2, 2]}, "different indices"),
    "nothing": ({"trainable_tokens": {"embed": []}}, "expected a list of indices"),
    "a fraction": ({"trainable_tokens": [1.5]}, "expected a list of indices"),
    "a number": ({"trainable_tokens": 3}, "expected a list of indices"),
    "an unknown layer": ({"trainable_tokens": {"wte": [1]}}, "'wte', which matches no embedding"),
    "adapted too": ({"trainable_tokens": [1], "target": ["embed"]}, "adapted or trained whole too"),
    "whole too": ({"trainable_tokens": [1], "modules_to_save": ["embed"]}, "adapted or trained whole too"),
    "nothing at all": ({"target": []}, r"\[\] matches no layer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokens_are_refused_and_change_nothing(case):
    settings, word = BAD[case]
    model = Net()
    with pytest.raises(lr.LowRankError, match=word):
        lr.add_lora_(model, **{"target": ["fc"], "rank": 2, **settings})
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(Net().state_dict())


def test_two_embeddings_are_to_be_named():
    model = nn.ModuleDict({"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4)})
    with pytest.raises(lr.LowRankError, match=r"embeddings \['a', 'b'\]; give them by name"):
        lr.add_lora_(model, [], trainable_tokens=[1])
    lr.add_lora_(model, [], trainable_tokens={"a": [1], "b": [2, 3]})
    assert [tuple(p.shape) for p in lr.lora_parameters(model)] == [(1, 4), (2, 4)]
