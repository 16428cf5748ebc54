"""What PEFT's files call the weights of a model, and the rest that they hold of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ...layers import is_compressed
from ..adapted_weight import AdaptedWeight, base_modules
from ..weight_layout import Matrix, is_conv1d

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"
TRAINED_MARK = "_saved_with_lora"
"""Attribute of a parameter of the base that was read from an adapter's file, and belongs into the next one."""
EMBEDDING_MARK = "_embedding_of_adapter"
"""Attribute of a frozen embedding, or head, whose values an adapter's file brought with it."""


@dataclass(frozen=True)
class PeftWeight:
    """A weight of a model with its names in PEFT.

    Args:
        weight: the weight.
        label: the name that rank and alpha patterns are matched with.
        path: name of the module in PEFT's model that holds ``lora_A``.
    """

    weight: AdaptedWeight
    label: str
    path: str

    @property
    def keys(self) -> dict[str, str]:
        """Names in the file of ``a``, ``b``, ``magnitude`` and ``bias``."""
        embedding = self.weight.layout == Matrix(transposed=True) and not is_conv1d(self.weight.module)
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        parts = {"a": a, "b": b, "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
        return {part: f"{PREFIX}{self.path}.{name}" for part, name in parts.items()}


def peft_weights(
    modules: Mapping[str, nn.Module], labels: Mapping[AdaptedWeight, str]
) -> tuple[list[PeftWeight], dict[str, int]]:
    """The weights in PEFT's order, and how often it wraps each module; what is wrapped stands below ``base_layer``.

    Args:
        modules: all modules of the base by name.
        labels: the adapted weights, with the names that patterns are matched with.
    """
    order = {place: k for k, place in enumerate(named_parameters(modules))}
    weights = sorted(labels, key=lambda weight: order.get((weight.owner, weight.parameter), -1))
    wraps = Counter(weight.owner for weight in weights)
    left = Counter(wraps)
    found = []
    for weight in weights:
        left[weight.owner] -= 1  # the last of a module's parameters is the outermost
        found.append(PeftWeight(weight, labels[weight], peft_path(weight.owner, wraps, left[weight.owner])))
    return found, dict(wraps)


def peft_path(name: str, wraps: Mapping[str, int], own: int) -> str:
    """The name of a module in PEFT's model, where every wrapped module on the way has a ``base_layer``.

    Args:
        name: name of the module in the plain model.
        wraps: how often each module is wrapped.
        own: how often the module itself is wrapped below the one that is named.
    """
    parts = name.split(".")
    path: list[str] = []
    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        path += [part] + ["base_layer"] * (own if last else wraps.get(".".join(parts[: k + 1]), 0))
    return ".".join(path)


def named_parameters(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """Every parameter as the name of its module and its name there, in the order of the model."""
    return [
        (name, key)
        for name, module in modules.items()
        if name
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def is_plain_target(module: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for this kind of module, attention aside."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return not is_compressed(module) and (isinstance(module, kinds) or is_conv1d(module))


def saved_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that PEFT keeps a full copy of: every name that ends so, without those inside another."""
    wanted = tuple(names)
    found = [name for name in base_modules(model) if wanted and name.endswith(wanted)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def whole_keys(model: nn.Module, bias: str, saved: Iterable[str], wraps: Mapping[str, int]) -> dict[str, str]:
    """Keys of what a file holds whole, with the model's names of it.

    Args:
        model: the model.
        bias: which biases of the base belong to the file: ``"none"``, ``"all"`` or ``"lora_only"``.
        saved: names of the modules that are saved whole.
        wraps: how often each module is wrapped.
    """
    keys: dict[str, str] = {}
    modules = base_modules(model)
    for name in saved:
        for key in modules[name].state_dict():
            if ".lora_" not in f".{key}":
                keys[f"{PREFIX}{name}.{key}"] = f"{name}.{key}"
    for name, module in modules.items() if bias != "none" else ():
        place = f"{name}.bias" if name else "bias"
        if module._parameters.get("bias") is None or place in keys.values() or (bias != "all" and name not in wraps):
            continue
        path = peft_path(name, wraps, wraps.get(name, 0))
        keys[f"{PREFIX}{path}.bias" if name else f"{PREFIX}bias"] = place
    return keys


def token_key(owner: str) -> str:
    """The key of the rows of an embedding that are trained on their own."""
    return f"{PREFIX}{owner}{TOKENS}"


def embedding_keys(model: nn.Module, wraps: Mapping[str, int]) -> dict[str, str]:
    """Keys of the frozen embeddings that PEFT writes where they are adapted or were resized, with the model's names."""
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    names = [name for name, module in base_modules(model).items() if name and any(module is end for end in ends)]
    return {f"{PREFIX}{peft_path(name, wraps, wraps.get(name, 0))}.weight": f"{name}.weight" for name in names}
