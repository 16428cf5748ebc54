"""Loads the small Llama in ../shared/data and its tokenizer, for the examples with language models."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

DATA = Path(os.environ.get("LOWRANK_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads a model and its tokenizer from a folder."""
    if not (folder / "tokenizer.json").exists():
        raise SystemExit(f"There is no model in {folder}: give --model a folder with a Llama and its tokenizer.json.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("torchvision"):
        # transformers imports it, and beside a CPU-only torch it needs help
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from benchmarks.vision import import_torchvision

        import_torchvision()
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype), Tokenizer.from_file(str(folder / "tokenizer.json"))
