"""Folders of transformers: GPT-2, whose weights are ``[in, out]``, and a Llama, there and back."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.command_line import main

from ..lora import peer

transformers = pytest.importorskip("transformers")
SMALL = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
}
TOKENS = torch.arange(8)[None]


def build(kind):
    config = transformers.AutoConfig.for_model(kind, vocab_size=20, pad_token_id=0, **SMALL[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@peer.known_warnings
@pytest.mark.parametrize("kind", SMALL)
def test_the_change_is_extracted_and_merged(kind, tmp_path):
    peft = peer.peft()
    base = build(kind)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, module in tuned.named_modules():
            if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)) and name != "lm_head":
                rows, columns = module.weight.shape
                module.weight += 0.1 * torch.randn(rows, 2) @ torch.randn(2, columns)
            elif "ln_" in name or "norm" in name:
                module.weight += 0.1
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    expected = tuned(TOKENS).logits
    assert main(["extract-lora", *(str(tmp_path / name) for name in ("base", "tuned", "adapter")), "--rank=2"]) == 0
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    assert main(["merge-lora", *(str(tmp_path / name) for name in ("base", "adapter", "merged"))]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", "lm_head.weight=transformer.wte.weight"), ("llama", None)])
def test_a_compressed_folder_is_loaded_into_the_dense_class(kind, tied, tmp_path):
    model, out = build(kind), str(tmp_path / "small.safetensors")
    model.save_pretrained(tmp_path / "model")
    options = ["--rank=4", "--exclude=lm_head"] if tied is None else ["--rank=4", "--tied", tied]
    assert main(["apply", str(tmp_path / "model"), out, *options]) == 0
    loaded = lr.load(out, into=build(kind)).eval()
    lr.factorize_(model, lr.make_plan(model, rank=4, methods=[lr.SVDMethod()], skip=["lm_head", nn.Embedding]))
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", SMALL)
def test_a_folder_becomes_a_folder_that_from_pretrained_reads(kind, tmp_path, capsys):
    model = build(kind)
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    options = ["--rank=4", *(["--exclude=lm_head"] if kind == "llama" else [])]
    assert main(["apply", str(tmp_path / "model"), str(tmp_path / "small"), *options]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    skip = ["lm_head", nn.Embedding]
    lr.factorize_(model, lr.make_plan(model, rank=4, methods=[lr.SVDMethod()], skip=skip))
    assert sum(isinstance(module, lr.LowRankLinear) for module in loaded.modules()) > 2
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert lr.Plan.load(tmp_path / "small" / "plan.json").after.params == model.num_parameters()
    capsys.readouterr()
    assert main(["apply", str(tmp_path / "model"), str(tmp_path / "small"), *options]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "it", "while", "rain", "fell"]


def write_with_tokenizer(folder) -> None:
    """A Llama with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    build("llama").save_pretrained(folder)
    words = {word: k for k, word in enumerate(dict.fromkeys([*WORDS, "[UNK]"]))}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(folder)


def test_a_folder_is_compressed_on_a_text(tmp_path, capsys):
    write_with_tokenizer(tmp_path / "model")
    text = " ".join(WORDS * 20)
    (tmp_path / "text.txt").write_text(text)
    options = ["--budget=0.8", f"--text={tmp_path / 'text.txt'}", "--windows=6", "--length=20", r"--exclude=up_proj$"]
    assert main(["apply", str(tmp_path / "model"), str(tmp_path / "small"), *options]) == 0
    assert "model.layers.1.mlp.up_proj: left alone, as asked" in capsys.readouterr().out
    ids = torch.tensor([list(dict.fromkeys(WORDS)).index(word) for word in text.split()])
    batches = [ids[k * ((len(ids) - 20) // 5) :][None, :20] for k in range(6)]
    plan = lr.compress_checkpoint(
        tmp_path / "model", tmp_path / "own", lr.Budget(params=0.8), batches, skip=["up_proj"]
    )
    assert plan == lr.Plan.load(tmp_path / "small" / "plan.json")
    loaded = lr.load(tmp_path / "small", into=build("llama"))
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert (tmp_path / "small" / "tokenizer.json").is_file()
    missing = ["--budget=0.8", f"--text={tmp_path / 'text.txt'}", "--windows=600"]
    assert main(["apply", str(tmp_path / "model"), str(tmp_path / "new"), *missing]) == 2
    assert "expected 600 windows" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
