"""The language models of benchmarks.language with the texts that they are calibrated on and scored on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import ROOT, available
from .kv_subjects import spread, wikitext
from .smollm2 import smollm2
from .vision import import_torchvision


@dataclass
class Case:
    """A model and its texts.

    Args:
        name: name of the model.
        model: the model, in fp32.
        calibration: windows of tokens, ``[count, length]``.
        scored: windows of tokens by name of the text.
        endings: the tokens of passages, and how many of them are the last word.
        training: windows of tokens to train on, ``[count, length]``.
    """

    name: str
    model: Any
    calibration: Tensor
    scored: dict[str, Tensor]
    endings: list[tuple[Tensor, int]]
    training: Tensor


def case(
    folder: Path | None,
    device: str,
    calibration: int,
    windows: int,
    passages: int,
    training: int = 0,
    length: int = 512,
) -> Case:
    """SmolLM2-135M-Instruct, or the language model in a folder.

    Args:
        folder: a folder of transformers; ``None`` is SmolLM2 from its package.
        device: where the model and the tokens are put.
        calibration: tokens of WikiText-2 (valid) to calibrate on, in windows that are spread over it.
        windows: windows of WikiText-2 (test) to score, from its beginning on; a third as many of the other texts.
        passages: passages of LAMBADA whose last word is to be found.
        training: tokens of WikiText-2 (valid) to train on, likewise.
        length: tokens of a window.
    """
    if not available("text", "pycode_llama"):
        raise SystemExit("language: got no folders text and pycode_llama in LOWRANK_DATA; see benchmarks/data.py.")
    if folder is None:
        name, (model, tokenizer) = "SmolLM2-135M-Instruct", smollm2()
    else:
        import_torchvision()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = folder.resolve().name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False).input_ids, device=device)

    def first(text: str, count: int) -> Tensor:
        found = tokens(text)
        return found[: len(found) // length * length].view(-1, length)[:count]

    fewer = max(1, windows // 3)
    code = (ROOT / "pycode_llama" / "valid.txt").read_text(encoding="utf-8")
    stories = (ROOT / "text" / "tinystories_v2_valid_slice.txt").read_text(encoding="utf-8")
    scored = {
        "WikiText": first(wikitext("test"), windows),
        "code": first(code, fewer),
        "stories": first(stories, fewer),
    }
    endings = []
    for line in (ROOT / "text" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[:passages]:
        text = json.loads(line)["text"]
        context = text[: text.rindex(" ")]
        whole = tokens(text)
        endings.append((whole, len(whole) - len(tokens(context))))
    valid = tokens(wikitext("valid"))
    calibrated, trained = (
        torch.stack(spread(valid, max(1, count // length), length)) for count in (calibration, training)
    )
    return Case(name, model.to(device), calibrated, scored, endings, trained)


def small(device: str) -> Case:
    """A random Llama that reads random bytes, to see that the script runs."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    windows = torch.randint(0, 128, (10, 32), device=device)
    endings = [(row, 1 + k % 2) for k, row in enumerate(windows[8:])]
    model = LlamaForCausalLM(config).eval().to(device)
    return Case("a random Llama", model, windows[:4], {"noise": windows[4:8]}, endings, windows[:6])
