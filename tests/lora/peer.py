"""PEFT, where it is installed and can be imported."""

import importlib.util
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.vision import import_torchvision

known_warnings = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to",
    "ignore:.lora_bias=True. was passed but the targeted layer",
    "ignore:LoRA adapter added to ConvNd layer with groups",
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:PiSSA changes the base weights of the model",
    "ignore:Adapter .* LoRA tensor.* have invalid shape.*lora_B.bias",
)
"""The warnings that PEFT and transformers give of what these tests do on purpose."""


def peft() -> ModuleType:
    """The peer, or a skip; it imports torchvision on its way, which may need help."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    return pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)


def wrapped(model: nn.Module, target: list[str], *, scrambled: bool = True, **settings: Any) -> Any:
    """PEFT's LoRA on some modules of a model, which it changes; rank 4 and scaling 2 unless told."""
    library = peft()
    config = library.LoraConfig(target_modules=target, **{"r": 4, "lora_alpha": 8, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.get_peft_model(model, config)
    if scrambled:
        scramble(theirs)
    return theirs


def second(theirs: Any, target: list[str], name: str = "second", **settings: Any) -> None:
    """One more of its adapters; the first stays in use."""
    theirs.add_adapter(name, peft().LoraConfig(target_modules=target, **{"r": 4, "lora_alpha": 8, **settings}))
    theirs.set_adapter("default")


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    """Deltas that are not zero, of either library."""
    for name, parameter in model.named_parameters():
        if name.endswith(".A") and not parameter.any():  # of an embedding
            parameter.normal_(std=0.1)
        elif name.endswith(".B") or any(part in name for part in ("lora_B.", "lora_embedding_A.")):
            parameter.normal_()
