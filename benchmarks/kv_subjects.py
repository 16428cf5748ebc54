"""The language models of benchmarks.kv_real, with the texts that they are scored on and calibrated with."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lowrank_layers as lr

from .data import ROOT, available
from .kv_driver import Driver
from .smollm2 import smollm2
from .vision import import_torchvision

NAMES = ("smollm2", "pycode_llama")


@dataclass
class Subject:
    """A model, its tokenizer, and texts."""

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    prompts: tuple[int, ...]
    """Tokens of the prompts after which text is scored."""
    scored: dict[str, Tensor]
    """Tokens of texts on which caches are scored."""
    others: dict[str, Tensor]
    """Tokens of other texts of the same kinds, for calibration."""
    device: str = "cpu"
    driver: Driver = field(init=False)
    rotation: lr.Rotation = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.model.to(self.device)
        for texts in (self.scored, self.others):
            texts.update({key: tokens.to(self.device) for key, tokens in texts.items()})
        self.driver = Driver(self.model)
        self.rotation = lr.Rotation(self.model.model.rotary_emb.inv_freq.float())

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)


def wikitext(split: str) -> str:
    """WikiText-2 with its marks taken off: unknown words become "the", joined signs are joined again."""
    text = (ROOT / "text" / f"wikitext2_{split}.txt").read_text(encoding="utf-8")
    return re.sub(r" @([-,.])@ ", r"\1", text.replace("<unk>", "the"))


def spread(tokens: Tensor, count: int, length: int) -> list[Tensor]:
    """Evenly spaced windows."""
    step = (len(tokens) - length) // count
    return [tokens[k * step + step // 2 :][:length] for k in range(count)]


def subject(name: str, args: argparse.Namespace) -> Subject:
    """Loads a model."""
    if args.smoke:
        return small(name, args.device)
    if not available("text", "pycode_llama"):
        raise SystemExit("kv_real: got no folders text and pycode_llama in LOWRANK_DATA; see benchmarks/data.py.")
    code = (ROOT / "pycode_llama" / "valid.txt").read_text(encoding="utf-8")
    if name == "pycode_llama":
        import_torchvision()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(ROOT / name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(ROOT / name)
        whole = {"code": code}
        prompts: tuple[int, ...] = (768,)
    else:
        model, tokenizer = smollm2(args.smollm2)
        stories = (ROOT / "text" / "tinystories_v2_valid_slice.txt").read_text(encoding="utf-8")
        whole = {"code": code, "stories": stories}
        prompts = (2048, 8192 - 256)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False).input_ids)

    halves = {key: torch.tensor(encode(text)).chunk(2) for key, text in whole.items()}
    scored, others = ({key: half[which] for key, half in halves.items()} for which in (1, 0))
    if name == "smollm2":
        scored = {"WikiText": torch.tensor(encode(wikitext("test")))} | scored
        others = {"WikiText": torch.tensor(encode(wikitext("valid")))} | others
    return Subject(name, model, encode, tokenizer.decode, prompts, scored, others, args.device)


def small(name: str, device: str) -> Subject:
    """A random Llama that reads bytes."""
    import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    texts = {"noise": torch.randint(32, 128, (4000,))}
    model = LlamaForCausalLM(config).eval()
    return Subject(
        name,
        model,
        lambda text: list(text.encode()),
        lambda ids: bytes(ids).decode("latin-1"),
        (192,),
        texts,
        dict(texts),
        device,
    )
