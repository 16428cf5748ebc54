"""PEFT writes and we read, we write and PEFT reads: every kind of layer with every setting."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_layers as lr

from ..peer import known_warnings
from .models import Attention, gpt2, llama, mlp, peft, run, scramble, stack, tokens

pytestmark = known_warnings

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
VARIANTS = {
    "plain": {},
    "patterns": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora only": {"bias": "lora_only"},
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


def patterns(kind, variant):
    first, last = KINDS[kind][2]
    wanted = variant in ("patterns", "bias lora only")
    return {"rank_pattern": {first: 3}, "alpha_pattern": {last: 7}} if wanted else {}


def settings(kind, variant):
    targets = KINDS[kind][2]
    more = VARIANTS[variant] | patterns(kind, variant)
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
        **patterns(kind, variant),
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
