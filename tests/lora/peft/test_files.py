"""PEFT writes and we read, we write and PEFT reads; and files that fit nothing."""

import copy
import importlib.util
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_layers as lr
from benchmarks.data import ROOT
from benchmarks.vision import import_torchvision
from lowrank_layers.lora.adapter import Adapter

if importlib.util.find_spec("torchvision"):
    import_torchvision()  # transformers imports it where it is installed
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

REAL = ROOT / "lora_real" / "roberta_base_lora_mnli.bin"
pytestmark = pytest.mark.filterwarnings("ignore")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mha(x, x, x)[0])


class Experts(nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 8, 10) if is_transposed else torch.randn(3, 10, 8))
        self.down = nn.Parameter(torch.randn(3, 10, 8) if is_transposed else torch.randn(3, 8, 10))

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.relu(x[None] @ up) @ down).sum(0)


def stack(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


def gpt2():
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def mlp():
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Linear(10, 6))


def tokens():
    return torch.randint(9, (2, 5))


KINDS = {
    "linear": (mlp, lambda: torch.randn(4, 8), ["0", "3"]),
    "linear without bias": (
        stack(lambda: nn.Linear(8, 6, bias=False), lambda: nn.Linear(6, 5, bias=False)),
        lambda: torch.randn(2, 3, 8),
        ["0", "1"],
    ),
    "conv1d": (
        stack(lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: nn.Conv1d(6, 5, 1)),
        lambda: torch.randn(2, 4, 9),
        ["0", "1"],
    ),
    "conv2d": (
        stack(lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), lambda: nn.Conv2d(6, 5, (1, 3), bias=False)),
        lambda: torch.randn(2, 4, 9, 9),
        ["0", "1"],
    ),
    "conv3d": (
        stack(lambda: nn.Conv3d(3, 4, (1, 2, 3), padding=1), lambda: nn.Conv3d(4, 4, 2)),
        lambda: torch.randn(2, 3, 4, 4, 4),
        ["0", "1"],
    ),
    "embedding": (
        stack(lambda: nn.Embedding(9, 8, padding_idx=2), lambda: nn.Linear(8, 4)),
        tokens,
        ["0", "1"],
    ),
    "conv1d of transformers": (gpt2, tokens, ["c_attn", "c_proj"]),
    "llama": (llama, tokens, ["q_proj", "v_proj"]),
    "attention": (Attention, lambda: torch.randn(2, 5, 8), ["mha", "head"]),
}
PATTERNS = {"rank_pattern": {"0": 3, "c_attn": 3, "q_proj": 3, "^mha": 3}, "alpha_pattern": {"1": 5, "v_proj": 5}}
VARIANTS = {
    "plain": {},
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora only": {"bias": "lora_only", **PATTERNS},
    "modules to save": {},
    "regular expression": {},
    "pissa": {},
}
SAVED = {"linear": ["1", "4"], "llama": ["lm_head", "norm"], "conv1d of transformers": ["ln_f"]}
IMPOSSIBLE = {("embedding", "lora bias"), ("attention", "dora"), ("attention", "lora bias")}
COMBINATIONS = [
    (kind, variant)
    for kind in KINDS
    for variant in VARIANTS
    if (kind, variant) not in IMPOSSIBLE and (variant != "modules to save" or kind in SAVED)
]
combinations = pytest.mark.parametrize(("kind", "variant"), COMBINATIONS, ids=" / ".join)


def run(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    return getattr(out, "logits", out)


def written_into_the_weights(model, kind):
    """PEFT adds the delta of an attention's output projection twice (0.21); the dense weight has it once."""
    plain = KINDS[kind][0]().eval()
    base = {key: value for key, value in model.state_dict().items() if ".lora_" not in f".{key}"}
    plain.load_state_dict(base)
    with torch.no_grad():
        for name, module in model.named_modules():
            for key in getattr(module, "_adapted_names", ()):
                plain.get_submodule(name).get_parameter(key).copy_(getattr(module, key))
    return plain


@torch.no_grad()
def scramble(model):
    """Everything that may learn, at random; running statistics of what is kept whole too."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wanted = "lora_" in key or "modules_to_save" in key or getattr(tensor, "requires_grad", False)
        if wanted and tensor.is_floating_point() and "scaling" not in key and "gate" not in key:
            tensor.add_(torch.rand_like(tensor) * 0.3)


def settings(kind, variant):
    targets = KINDS[kind][2]
    more = dict(VARIANTS[variant])
    if variant == "modules to save":
        more["modules_to_save"] = SAVED[kind]
    if variant == "regular expression":
        targets = r"(.*\.)?(" + "|".join(targets) + ")"
    return {"r": 2, "lora_alpha": 5, "target_modules": targets, "lora_dropout": 0.1, **more}


@pytest.mark.parametrize(("kind", "variant"), [pair for pair in COMBINATIONS if pair[1] != "pissa"], ids=" / ".join)
def test_peft_writes_and_we_read(kind, variant, tmp_path):
    build, data, _ = KINDS[kind]
    base, x = build(), data()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings(kind, variant)))
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    before = run(base, x)
    assert lr.load_lora(base, tmp_path) is base
    out = run(base, x)
    assert not torch.allclose(out, before, atol=1e-3)
    if kind == "attention":
        theirs_weights = {key: value.clone() for key, value in theirs.state_dict().items()}
        attention, scaling = base.mha, theirs.base_model.model.mha.scaling["default"]
        prefix = "base_model.model.mha.base_layer.out_proj."
        product = theirs_weights[f"{prefix}lora_B.default.weight"] @ theirs_weights[f"{prefix}lora_A.default.weight"]
        expected = theirs_weights[f"{prefix}base_layer.weight"] + scaling * product
        assert torch.allclose(attention.out_proj.weight, expected, atol=1e-5)
        assert torch.allclose(out, run(written_into_the_weights(base, kind), x), atol=1e-5)
    else:
        assert torch.allclose(out, run(theirs, x), atol=1e-5)
    assert {key for key, p in base.named_parameters() if p.requires_grad} >= {
        key for key, _ in base.named_parameters() if "lora_" in key
    }


@combinations
def test_we_write_and_peft_reads(kind, variant, tmp_path):
    build, data, targets = KINDS[kind]
    base, x = build(), data()
    model = copy.deepcopy(base)
    more = {"rank_pattern": {targets[0]: 3}, "alpha_pattern": {targets[1]: 7}} if "only" in variant else {}
    more |= PATTERNS if variant == "patterns" else {}
    wanted = [*targets, "mha.out_proj"] if kind == "attention" else targets
    lr.add_lora_(
        model,
        wanted,
        rank=2,
        alpha=5,
        rslora=variant == "rslora",
        dora=variant == "dora",
        bias=variant == "lora bias" and "linear" in kind,
        init="pissa" if variant == "pissa" else "kaiming",
        **more,
    )
    if variant == "bias all":
        for key, parameter in model.named_parameters():
            if key.endswith(".bias"):
                parameter.requires_grad_(True)
    if variant == "modules to save":
        for key, module in model.named_modules():
            if key.endswith(tuple(SAVED[kind])):
                module.requires_grad_(True)
                for buffer in module.buffers():
                    if buffer.is_floating_point():
                        buffer.add_(0.1)
    scramble(model)
    if kind == "attention":  # PEFT would add it twice: see written_into_the_weights
        model.mha.out_proj.lora_weight.adapters["default"].B.data.zero_()
        if variant == "pissa":
            model.mha.out_proj.lora_weight.adapters["default"].b0.zero_()
    out = run(model, x)
    only = {"bias": "lora_only"} if variant == "bias lora only" else {}
    lr.save_lora(model, tmp_path, **only)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(theirs, x), out, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    first, resaved = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "theirs"))
    assert {key: t.shape for key, t in first.items()} == {key: t.shape for key, t in resaved.items()}
    ours = lr.load_lora(copy.deepcopy(base), tmp_path, trainable=False)
    assert torch.allclose(run(ours, x), out, atol=1e-5)
    assert not any(p.requires_grad for p in ours.parameters())
    lr.save_lora(ours, tmp_path / "again", **only)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_with_an_a_that_is_zero_elsewhere(groups, tmp_path):
    base, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups)), torch.randn(2, 8, 6, 6)
    model = lr.add_lora_(copy.deepcopy(base), ["0"], rank=2, alpha=3, init="gaussian")
    scramble(model)
    lr.save_lora(model, tmp_path)
    assert torch.allclose(
        run(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), x), run(model, x), atol=1e-5
    )
    assert torch.allclose(run(lr.load_lora(copy.deepcopy(base), tmp_path), x), run(model, x), atol=1e-5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_stacked_experts_as_target_parameters(is_transposed, tmp_path):
    base, x = nn.Sequential(nn.Linear(8, 8), Experts(is_transposed)), torch.randn(4, 8)
    model = lr.add_lora_(copy.deepcopy(base), ["0", "1.up", "1.down"], rank=2, alpha=3, rank_pattern={"0": 3})
    scramble(model)
    lr.save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(theirs, x), run(model, x), atol=1e-4)
    assert torch.allclose(run(lr.load_lora(copy.deepcopy(base), tmp_path), x), run(model, x), atol=1e-5)
    config = peft.LoraConfig(r=2, target_modules=["0"], target_parameters=["1.up", "down"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "theirs"), x), run(theirs, x), atol=1e-4)


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_what_peft_computes_wrong_is_the_delta_in_the_weight(settings, tmp_path):
    """PEFT's convolution to ``A`` has neither dilation nor padding mode (#3697); the file is the same."""
    base, x = nn.Sequential(nn.Conv2d(4, 6, 3, **settings)), torch.randn(2, 4, 9, 9)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"]))
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    dense = copy.deepcopy(base)
    with torch.no_grad():
        dense[0].weight += theirs.base_model.model[0].get_delta_weight("default")
    assert torch.allclose(run(lr.load_lora(base, tmp_path), x), run(dense, x), atol=1e-5)


def test_pissa_of_peft_once_converted_and_only_then(tmp_path):
    base, x = mlp(), torch.randn(4, 8)
    config = peft.LoraConfig(r=2, target_modules=["0", "3"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "as it is")
    out = run(theirs, x)
    with pytest.raises(lr.CheckpointError, match="'pissa': this adapter goes with a base"):
        lr.load_lora(base, tmp_path / "as it is")
    theirs.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert torch.allclose(run(lr.load_lora(base, tmp_path / "new"), x), out, atol=1e-5)


def test_only_some_layers(tmp_path):
    base, x = llama(), tokens()
    where = {"layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["v_proj"]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], **where)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(run(lr.load_lora(base, tmp_path), x), run(theirs, x), atol=1e-5)
    names = [name for name, module in base.named_modules() if isinstance(module, Adapter)]
    assert len(names) == 2


def test_a_classifier_of_transformers_and_its_tables(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**sizes, intermediate_size=24, num_labels=3, max_position_embeddings=12)
    base, x = transformers.RobertaForSequenceClassification(config), tokens() + 3
    lora = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "word_embeddings"])
    theirs = peft.get_peft_model(copy.deepcopy(base), lora)
    scramble(theirs)
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(run(lr.load_lora(base, tmp_path), x), run(theirs, x), atol=1e-5)


def test_a_name_that_ends_other_names_is_written_as_an_expression(tmp_path):
    base, x = nn.Sequential(), torch.randn(3, 8)
    base.add_module("fc", nn.Linear(8, 8))
    base.add_module("block", nn.Sequential())
    base.block.add_module("fc", nn.Linear(8, 8))
    model = lr.add_lora_(copy.deepcopy(base), "fc", rank=2)
    scramble(model)
    lr.save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(run(theirs, x), run(model, x), atol=1e-5)
    assert not any("block" in key and "lora_" in key for key in theirs.state_dict())


def test_onto_a_compressed_layer_and_beside_another_adapter(tmp_path):
    base, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    model = lr.add_lora_(copy.deepcopy(base), rank=2)
    scramble(model)
    lr.save_lora(model, tmp_path)
    small = nn.Sequential(lr.LowRankLinear.from_dense(base[0], rank=3))
    lr.load_lora(small, tmp_path, "first")
    delta = run(model, x) - run(base, x)
    plain = run(nn.Sequential(lr.LowRankLinear.from_dense(base[0], rank=3)), x)
    assert torch.allclose(run(small, x) - plain, delta, atol=1e-5)
    lr.load_lora(small, tmp_path, "second")
    assert torch.allclose(run(small, x) - plain, 2 * delta, atol=1e-5)
    with pytest.raises(lr.CheckpointError, match="'0' has an adapter 'first' already"):
        lr.load_lora(small, tmp_path, "first")
    with pytest.raises(lr.LowRankError, match="give the name"):
        lr.save_lora(small, tmp_path)
    with pytest.raises(lr.UnsupportedLayerError, match=r"'0\.weight', which is a LowRankLinear: call densify_"):
        lr.save_lora(small, tmp_path, "first")


REFUSED = {
    "recurrent": (lambda: nn.Sequential(nn.LSTM(4, 6)), ["0"], r"'0\.weight_ih_l0'.*'0\.weight_hh_l0'"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3)), ["0"], "ConvTranspose2d"),
    "factored": (lambda: nn.Sequential(lr.TuckerConv2d(4, 6, 3, rank=2)), ["0"], "TuckerConv2d"),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 6)), ["0"], "EmbeddingBag"),
    "kdim": (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=4)}), ["a"], "kdim"),
    "the model itself": (lambda: nn.Linear(4, 6), ".*", "the model itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_adapters_for_is_refused_by_name(case, tmp_path):
    build, target, words = REFUSED[case]
    model = lr.add_lora_(build(), target, rank=1)
    with pytest.raises(lr.UnsupportedLayerError, match=words):
        lr.save_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def edited(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def rewritten(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def torn(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])


A = "base_model.model.0.lora_A.weight"
BAD = {
    "missing key": (rewritten(lambda t: t.pop(A)), r"missing 'base_model\.model\.0\.lora_A\.weight'"),
    "extra key": (rewritten(lambda t: t.update(extra=torch.ones(2))), "unknown 'extra'"),
    "mistyped key": (
        rewritten(lambda t: t.update({A.replace("lora_A", "lora_a"): t.pop(A)})),
        r"missing .*lora_A.*unknown .*lora_a",
    ),
    "wrong shape": (rewritten(lambda t: t.update({A: torch.ones(2, 9)})), r"shape \(2, 9\), expected \(2, 8\)"),
    "wrong dtype": (rewritten(lambda t: t.update({A: torch.ones(2, 8, dtype=torch.int32)})), "int32"),
    "not finite": (rewritten(lambda t: t[A].fill_(torch.nan)), "NaN"),
    "wrong rank": (edited(r=3), r"expected \(3, 8\)"),
    "torn tensors": (torn("adapter_model.safetensors"), "torn"),
    "torn settings": (torn("adapter_config.json"), "no JSON"),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "no such file"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither"),
    "peft_type": (edited(peft_type="IA3"), "IA3"),
    "no peft_type": (edited(peft_type=None), "peft_type is None"),
    "an unknown layer": (edited(target_modules=["0", "q_proj"]), "'q_proj', which the model has not"),
    "no layer": (edited(target_modules="x.*"), "matches nothing"),
    "a layer PEFT cannot adapt": (edited(target_modules=["0", "1"]), "'1' is a BatchNorm1d"),
    "a bad expression": (edited(target_modules="("), r"target_modules is '\('"),
    "a bad rank": (edited(r="2"), "r is '2', expected an integer"),
    "a bad pattern": (edited(rank_pattern={"0": 0}), "rank_pattern"),
    "a bad dropout": (edited(lora_dropout=1.5), "lora_dropout"),
    "pissa without conversion": (edited(init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
    "corda": (edited(init_lora_weights="corda"), "corda"),
    "alora": (edited(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "megatron": (edited(megatron_config={"a": 1}, use_qalora=True), "megatron_config.*use_qalora"),
    "a newer field": (edited(use_magic=True), "use_magic"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_change_nothing(case, tmp_path):
    spoil, words = BAD[case]
    model = mlp()
    lr.save_lora(lr.add_lora_(copy.deepcopy(model), ["0"], rank=2), tmp_path, modules_to_save=["4"])
    lr.load_lora(copy.deepcopy(model), tmp_path)
    spoil(tmp_path)
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(lr.CheckpointError, match=words):
        lr.load_lora(model, tmp_path)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = lr.add_lora_(mlp(), rank=2)
    lr.save_lora(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    scramble(model)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("lowrank_layers.lora.peft.save.save_file", full)
    with pytest.raises(lr.CheckpointError, match="no space left"):
        lr.save_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_torch_files(tmp_path):
    model, x = mlp(), torch.randn(3, 8)
    adapted = lr.add_lora_(copy.deepcopy(model), rank=2)
    scramble(adapted)
    lr.save_lora(adapted, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    assert torch.allclose(run(lr.load_lora(model, tmp_path), x), run(adapted, x), atol=1e-6)


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_a.weight", "lora_b.weight")])
def test_files_without_settings(names, tmp_path):
    model, x = mlp(), torch.randn(3, 8)
    a, b, bias = torch.randn(2, 8), torch.randn(12, 2), torch.randn(6)
    file = tmp_path / "adapter_0.pt"
    torch.save({f"0.{names[0]}": a, f"0.{names[1]}": b, "4.bias": bias}, file)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[0].weight += 3 / 2 * b @ a
        dense[4].bias.copy_(bias)
    for settings, words in (({}, "alpha None"), ({"alpha": 3, "rank": 4}, "expected \\(4, 8\\)")):
        with pytest.raises(lr.CheckpointError, match=words):
            lr.load_lora(model, file, **settings)
    assert torch.allclose(run(lr.load_lora(model, file, alpha=3), x), run(dense, x), atol=1e-5)
    torch.save({f"0.{names[0]}": torch.randn(4, 8), f"0.{names[1]}": b, f"9.{names[0]}": a}, file)
    with pytest.raises(lr.CheckpointError, match=r"MergedLinear.*'9', which the model has not"):
        lr.load_lora(mlp(), file, alpha=3)


@pytest.mark.skipif(not REAL.exists(), reason="the released adapter is not there")
def test_the_released_adapter_of_loralib():
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=40, num_labels=3)
    model, x = transformers.RobertaForSequenceClassification(config), torch.randint(5, 50, (2, 7))
    dense, tensors = copy.deepcopy(model), torch.load(REAL, map_location="cpu", weights_only=True)
    lr.load_lora(model, REAL, rank=8, alpha=16)
    with torch.no_grad():
        for key, value in tensors.items():
            if key.endswith("lora_A"):
                dense.get_submodule(key[:-7]).weight += 2 * tensors[key[:-1] + "B"] @ value
            elif "lora_" not in key:
                dense.get_parameter(key).copy_(value)
    assert torch.allclose(run(model, x), run(dense, x), atol=1e-5)
    assert sum(isinstance(module, Adapter) for module in model.modules()) == 24


@pytest.mark.parametrize("dora", [False, True])
def test_the_bias_of_an_adapter_counts_merged_and_row_by_row(dora):
    model, x = lr.add_lora_(nn.Sequential(nn.Linear(8, 6)), rank=2, bias=True, dora=dora), torch.randn(2, 8)
    base = copy.deepcopy(model[0]).bias
    with torch.no_grad():
        model[0].lora_weight.adapters["default"].bias.add_(1)
    out = run(model, x)
    assert torch.allclose(run(lr.merge_lora_(model), x), out, atol=1e-5)
    lr.unmerge_lora_(model)
    assert torch.allclose(out - nn.functional.linear(x, model[0].weight, base), torch.ones(2, 6), atol=1e-5)
    if not dora:
        with lr.lora_rows(model, ["default", None]):
            mixed = run(model, x)
        assert torch.allclose(mixed[0], out[0], atol=1e-6)
        with lr.lora_disabled(model):
            assert torch.allclose(mixed[1], run(model, x)[1], atol=1e-6)


def test_nothing_warns(tmp_path):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr.save_lora(lr.add_lora_(copy.deepcopy(model), rank=2), tmp_path)
        lr.load_lora(model, tmp_path)


def test_onto_a_model_in_eval_mode_nothing_drops_out(tmp_path):
    base, x = gpt2().eval(), tokens()
    model = lr.add_lora_(copy.deepcopy(base), ["c_attn"], rank=2, dropout=0.5)
    scramble(model)
    lr.save_lora(model, tmp_path)
    loaded = lr.load_lora(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, loaded(x).logits)
        assert torch.allclose(loaded(x).logits, run(model, x), atol=1e-6)
        assert not torch.equal(loaded.train()(x).logits, loaded(x).logits)


def test_rows_of_a_batch_through_transformers_conv1d():
    model, x = gpt2().eval(), tokens()
    for name in ("a", "b"):
        lr.add_lora_(model, ["c_attn"], rank=2, name=name)
        scramble(model)
    with torch.no_grad():
        outs = {name: lr.use_adapter(model, name)(x).logits for name in ("a", "b")}
        with lr.lora_rows(model, ["b", "a"]):
            mixed = model(x).logits
    assert torch.allclose(mixed, torch.stack([outs["b"][0], outs["a"][1]]), atol=1e-5)
