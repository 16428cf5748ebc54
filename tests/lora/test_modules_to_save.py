"""A head that is trained whole beside the adapters, by each adapter its own; and what "all-linear" leaves out."""

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.lora.adapter import Adapter

from .peer import known_warnings

if importlib.util.find_spec("torchvision"):
    import_torchvision()  # transformers imports it where it is installed
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = known_warnings

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def llama(**more):
    config = transformers.LlamaConfig(**SIZES, **LAYERS, bos_token_id=0, eos_token_id=0, **more)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0))


def classifier(kind, **more):
    config = transformers.RobertaConfig(**SIZES, **LAYERS, max_position_embeddings=12, **more)
    return getattr(transformers, f"RobertaFor{kind}")(config)


def llama_classifier():
    config = transformers.LlamaConfig(**SIZES, **LAYERS, pad_token_id=0, num_labels=2)
    return transformers.LlamaForSequenceClassification(config)


@torch.no_grad()
def scramble(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def adapted(name="default", **settings):
    return lr.add_lora_(Net().eval(), ["body"], rank=2, name=name, modules_to_save=["norm", "head"], **settings)


# ------------------------------------------------------------------------------------------------------- "all-linear"


@pytest.mark.parametrize(
    ("build", "task", "head"),
    [
        (llama, "CAUSAL_LM", "lm_head"),
        (lambda: llama(tie_word_embeddings=True), "CAUSAL_LM", "lm_head"),
        (gpt2, "CAUSAL_LM", "lm_head"),
        (llama_classifier, "SEQ_CLS", "score"),
        (lambda: classifier("SequenceClassification"), "SEQ_CLS", "classifier"),
        (lambda: classifier("MultipleChoice"), "SEQ_CLS", "classifier"),
        (lambda: classifier("MaskedLM"), None, "decoder"),
    ],
    ids=["llama", "tied llama", "gpt2", "llama classifier", "classifier", "multiple choice", "masked"],
)
def test_all_linear_is_what_peft_takes(build, task, head):
    base = build()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    taken = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    lr.add_lora_(base, rank=2)
    own = {name.partition(".lora_")[0] for name, module in base.named_modules() if isinstance(module, Adapter)}
    assert own == taken
    assert not any(head in name.split(".") for name in own)


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_heads_that_peft_trains_whole_are_no_linear_layers_to_adapt(kind):
    """PEFT (0.21) adapts them and then fails to train them whole, as their task says."""
    model = lr.add_lora_(classifier(kind), rank=2)
    head = model.classifier if kind == "TokenClassification" else model.qa_outputs
    assert type(head) is nn.Linear


def test_a_plain_model_has_no_head_to_leave_out():
    model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "ALL-LINEAR", rank=2)
    assert all(hasattr(layer, "lora_weight") for layer in model)


@pytest.mark.parametrize("build", [gpt2, lambda: llama(tie_word_embeddings=True)])
def test_tied_models_merge_by_default(build):
    model, ids = lr.add_lora_(build().eval(), rank=2), torch.randint(20, (2, 5))
    scramble(model)
    want = model(ids).logits
    assert torch.allclose(lr.merge_lora_(model)(ids).logits, want, atol=1e-5)


# --------------------------------------------------------------------------------------------------- modules_to_save


def test_a_fresh_copy_changes_nothing_and_alone_is_trained():
    base, x = Net().eval(), torch.randn(4, 8)
    before, keys = base(x), set(base.state_dict())
    model = lr.add_lora_(base, ["body"], rank=2, modules_to_save=["head", "norm"])
    assert torch.equal(model(x), before)
    assert isinstance(model.head, nn.Sequential)
    assert keys <= set(model.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = ("scaling", "gate", "active", "running_mean", "running_var", "num_batches_tracked")
    assert trained == {name for name in model.state_dict() if ".lora_" in name and not name.endswith(buffers)}
    assert {id(p) for p in lr.lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_training_changes_the_copy_and_never_the_base():
    model, x = adapted(), torch.randn(16, 8)
    state = {k: v.clone() for k, v in model.state_dict().items() if ".lora_" not in k}
    with lr.lora_disabled(model):
        base = model(x)
    optimizer = torch.optim.AdamW(lr.lora_parameters(model), lr=0.1)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())  # running statistics too
    assert not torch.allclose(model(x), base, atol=1e-2)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base)
    assert not torch.equal(model.norm.lora_whole["default"].running_mean, model.norm.running_mean)


def test_every_adapter_has_its_own_head():
    model, x = adapted("french"), torch.randn(6, 8)
    scramble(model)
    lr.add_lora_(model, ["body"], rank=2, name="german", modules_to_save=["head"])
    scramble(model)
    out = {}
    for name in ("french", "german", None):
        out[name] = lr.use_adapter(model, name)(x)
    assert len({tuple(value.flatten().tolist()) for value in out.values()}) == 3
    alone = lr.remove_lora_(copy.deepcopy(model), "german")
    assert torch.allclose(lr.use_adapter(alone, "french")(x), out["french"], atol=1e-6)
    with pytest.raises(lr.LowRankError, match=r"'head\.0' is trained whole by each of .*french.*german"):
        lr.use_adapter(model, ["french", "german"])
    assert torch.equal(model(x), out[None])
    rows = ["french", "german", None, "german", "french", None]
    with lr.lora_rows(model, rows):
        mixed = model(x)
    want = torch.stack([out[name][k] for k, name in enumerate(rows)])
    assert torch.allclose(mixed, want, atol=1e-6)
    assert torch.equal(lr.use_adapter(model, "german")(x), out["german"])


def test_removed_leaves_no_trace_and_copies_and_pickles_are_whole():
    model, x = adapted(), torch.randn(4, 8)
    scramble(model)
    out = model(x)
    assert torch.equal(copy.deepcopy(model)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)
    fresh = adapted()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), out)
    fresh.load_state_dict(Net().state_dict())  # one of the base fits, and leaves the copies
    lr.remove_lora_(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in Net().modules()]
    assert list(model.state_dict()) == list(Net().state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_torchs_fast_path_does_not_pass_a_copy_by():
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval(), torch.randn(2, 5, 16)
    model = lr.add_lora_(layer, ["out_proj"], rank=2, modules_to_save=["linear1"])
    scramble(model)
    slow = model(x)
    with torch.no_grad():
        assert torch.allclose(model(x), slow, atol=1e-6)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)), nn.Linear(8, 8)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.body(x)


def test_a_container_stands_for_what_is_in_it(tmp_path):
    """It runs its children, and would run the copies too were they one of them."""
    base, x = Blocks(), torch.randn(6, 8)
    state = copy.deepcopy(base.state_dict())
    model = lr.add_lora_(copy.deepcopy(base), ["body"], rank=2, modules_to_save=["blocks"])
    scramble(model)
    model.train()(x)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [len(block) if isinstance(block, nn.Sequential) else 1 for block in model.blocks] == [2, 1]
    lr.save_lora(model, tmp_path)
    assert torch.equal(run(lr.load_lora(base, tmp_path), x), run(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_reads_a_weight_reads_that_in_use(dtype):
    """As losses do that take the head's weight and never call it."""
    model, x = adapted_in(dtype), torch.randn(6, 8, dtype=dtype)
    scramble(model)
    last = model.head[2]
    inner = torch.randn(4, 6, dtype=dtype)
    assert torch.allclose(nn.functional.linear(inner, last.weight, last.bias), last(inner), atol=0.02)
    with lr.lora_disabled(model):
        assert last.weight is last._parameters["weight"]
    lr.use_adapter(model, None)
    assert torch.equal(last(inner), nn.functional.linear(inner, last.weight, last.bias))
    lr.use_adapter(model, "default")
    if dtype == torch.float32:
        with torch.no_grad():
            last.weight.zero_(), last.bias.zero_()
        assert not model(x).any()
    else:
        with pytest.raises(lr.LowRankError, match="write to dict"):
            last.weight.data.zero_()


def adapted_in(dtype):
    return lr.add_lora_(Net().eval().to(dtype), ["body"], rank=2, modules_to_save=["norm", "head"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_embeddings_that_are_trained_whole_are_not_resized(tied, whole, tmp_path):
    """transformers would resize the module and not its copies, or one of its copies and not the module."""
    model, ids = llama(tie_word_embeddings=tied), torch.randint(20, (2, 5))
    lr.add_lora_(model, ["q_proj"], rank=2, modules_to_save=[whole])
    scramble(model)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        out, shapes = run(copied, ids), [p.shape for p in copied.parameters()]
        for part in (copied, copied.model) if whole == "embed_tokens" else (copied,):
            with pytest.raises(lr.LowRankError, match="resize the model before it is factorized or adapted"):
                part.resize_token_embeddings(25)
        assert [p.shape for p in copied.parameters()] == shapes
        assert torch.equal(run(copied, ids), out)
    lr.save_lora(model, tmp_path)
    loaded = lr.load_lora(llama(tie_word_embeddings=tied), tmp_path)
    with pytest.raises(lr.LowRankError, match="resize the model before"):
        loaded.resize_token_embeddings(25)
    lr.remove_lora_(model)
    model.resize_token_embeddings(25)
    assert run(model, ids).shape[-1] == 25
    assert "resize_token_embeddings" not in vars(model)


def test_other_adapters_leave_embeddings_resizable():
    model = lr.add_lora_(llama(), ["q_proj"], rank=2)
    model.resize_token_embeddings(25)
    assert len(lr.lora_parameters(model)) == 2
    assert run(model, torch.tensor([[24]])).shape[-1] == 25


def test_factorizing_an_adapted_model_leaves_the_copies_alone():
    model = nn.ModuleDict({"net": Net(), "more": nn.Linear(8, 8)})
    lr.add_lora_(model, ["body"], rank=2, modules_to_save=["head"])
    plan = lr.make_plan(model, rank=2)
    assert not any(".lora_" in entry.name for entry in plan)
    assert "net.head.0.lora_whole.default: left alone, it belongs to an adapter" in str(plan)
    lr.factorize_(model, plan)
    assert type(model["net"].head[0].lora_whole["default"]) is nn.Linear
    assert type(model["more"]) is lr.LowRankLinear


def test_compiles_as_it_runs():
    model, x = adapted(), torch.randn(4, 8)
    scramble(model)
    assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), atol=1e-6)


BAD = {
    "a string": (lambda m: lr.add_lora_(m, ["body"], 2, modules_to_save="head"), r"write \['head'\]"),
    "an unknown name": (lambda m: lr.add_lora_(m, ["body"], 2, modules_to_save=["score"]), "'score', which matches no"),
    "no parameters": (lambda m: lr.add_lora_(m, ["body"], 2, modules_to_save=["head.1"]), "Tanh without parameters"),
    "all that is adapted": (lambda m: lr.add_lora_(m, ["head.0"], 2, modules_to_save=["head"]), "modules_to_save="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_refused_and_change_nothing(case):
    attempt, word = BAD[case]
    model = Net()
    with pytest.raises(lr.LowRankError, match=word):
        attempt(model)
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(Net().state_dict())


def test_a_module_is_adapted_or_whole_whichever_adapter():
    model = adapted("a")
    keys = list(model.state_dict())
    with pytest.raises(lr.LowRankError, match="trains already"):
        lr.add_lora_(model, ["body"], 2, name="a", modules_to_save=["head"])
    with pytest.raises(lr.LowRankError, match="trained whole by another adapter"):
        lr.add_lora_(
            lr.add_lora_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0"], 2, modules_to_save=["1"]),
            ["1"],
            2,
            name="b",
        )
    with pytest.raises(lr.LowRankError, match="has adapters"):
        lr.add_lora_(model, ["head.0"], 2, name="b", modules_to_save=["body"])
    assert list(model.state_dict()) == keys
    nested = nn.ModuleDict({"first": nn.Linear(8, 8), "net": Net()})
    lr.add_lora_(nested, ["first"], 2, name="a", modules_to_save=["net"])
    with pytest.raises(lr.LowRankError, match="in a module that another"):
        lr.add_lora_(nested, ["first"], 2, name="b", modules_to_save=["net.head"])
    patched = Net()
    patched.norm.forward = lambda x: x
    with pytest.raises(lr.LowRankError, match="forward of its own"):
        lr.add_lora_(patched, ["body"], 2, modules_to_save=["norm"])
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    with pytest.raises(lr.LowRankError, match="name the attention"):
        lr.add_lora_(attention, ["b"], 2, modules_to_save=["out_proj"])


# ------------------------------------------------------------------------------------------------------- PEFT's files


def heads(name):
    if name == "net":
        return Net().eval(), torch.randn(5, 8), ["body"], ["norm", "head"]
    ids = torch.randint(3, 20, (2, 5))
    if name == "classifier":
        return classifier("SequenceClassification", num_labels=3).eval(), ids, ["query"], ["classifier"]
    return llama(tie_word_embeddings=name == "tied").eval(), ids, ["q_proj"], ["lm_head"]


def run(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("name", ["net", "classifier", "untied", "tied"])
def test_peft_and_we_read_each_others_heads(name, tmp_path):
    base, x, target, saved = heads(name)
    untouched = run(base, x)
    model = lr.add_lora_(copy.deepcopy(base), target, rank=2, modules_to_save=saved)
    scramble(model)
    lr.save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(run(theirs, x), run(model, x), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lr.load_lora(copy.deepcopy(base), tmp_path / "theirs", name="back")
    assert torch.allclose(run(back, x), run(model, x), atol=1e-5)
    with lr.lora_disabled(back):
        assert torch.equal(run(back, x), untouched)
    assert {n for n, p in back.named_parameters() if p.requires_grad and ".lora_" not in n} == set()
    scramble(back)
    lr.save_lora(back, tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert torch.allclose(run(theirs, x), run(back, x), atol=1e-5)


def test_two_files_on_one_model_keep_their_heads_apart(tmp_path):
    base, x = Net().eval(), torch.randn(5, 8)
    out = {}
    for name in ("a", "b"):
        model = lr.add_lora_(copy.deepcopy(base), ["body"], rank=2, modules_to_save=["head"])
        scramble(model)
        lr.save_lora(model, tmp_path / name)
        out[name] = run(model, x)
    both = base
    for name in out:
        lr.load_lora(both, tmp_path / name, name=name, trainable=False)
    for name, want in out.items():
        assert torch.allclose(run(lr.use_adapter(both, name), x), want, atol=1e-6)
    assert not any(p.requires_grad for p in both.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
@pytest.mark.parametrize("changed", [False, True])
def test_embeddings_that_peft_writes_with_an_adapter_stay_frozen(tied, target, changed, tmp_path):
    base, ids = llama(tie_word_embeddings=tied).eval(), torch.randint(20, (2, 5))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=target))
    scramble(theirs)
    if changed:
        with torch.no_grad():
            which = "embed_tokens" if "embed_tokens" in target else "lm_head"
            theirs.get_submodule(f"base_model.model.{'model.' * (which != 'lm_head')}{which}").weight.add_(0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lr.load_lora(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(run(model, ids), run(theirs, ids), atol=1e-5)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    model(ids).logits.square().mean().backward()
    torch.optim.AdamW(lr.lora_parameters(model), lr=0.1).step()
    lr.save_lora(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(run(back, ids), run(model, ids), atol=1e-5)
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "ours"), ids), run(model, ids), atol=1e-5)
