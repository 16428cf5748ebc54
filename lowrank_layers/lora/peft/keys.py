"""PEFT's adapter files: what their keys are called, how the tensors lie, what their settings mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...layers import LowRankLinear, is_factored
from ...modules import walk_layers
from ..adapted_weight import base_weight
from ..adapter import Adapter, Bank
from ..mixed_groups import MixedGroups
from ..weight_layout import Kernel, Kind, Matrix, is_conv1d, kind_of
from ..whole import Copies
from .config import Config

PREFIX = "base_model.model."
WHOLE = "_saved_with_lora"
"""On a parameter of the base that was read from an adapter's file, and belongs into the next one."""
EMBEDDING = "_embedding_of_adapter"
"""On a frozen embedding, or head, whose values an adapter's file brought with it."""
TOKENS = ".token_adapter.trainable_tokens_delta"
CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class Slot:
    """One weight that a file adapts.

    Args:
        owner: our name of its module.
        parameter: its name there.
        module: that module.
        label: what rank and alpha patterns are matched with.
        path: PEFT's name of the module that holds ``lora_A``.
    """

    owner: str
    parameter: str
    module: nn.Module
    label: str
    path: str

    @property
    def kind(self) -> Kind:
        """The layout of the weight."""
        return kind_of(self.module, self.parameter)

    @property
    def weight(self) -> Tensor:
        """The weight without its adapters."""
        return base_weight(self.module, self.parameter)

    @property
    def keys(self) -> dict[str, str]:
        """Names in the file of ``a``, ``b``, ``magnitude`` and ``bias``."""
        names = ("lora_A.weight", "lora_B.weight")
        if isinstance(self.kind, Matrix) and self.kind.transposed and not is_conv1d(self.module):
            names = ("lora_embedding_A", "lora_embedding_B")
        parts = {"a": names[0], "b": names[1], "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
        return {part: f"{PREFIX}{self.path}.{name}" for part, name in parts.items()}

    @property
    def swapped(self) -> bool:
        """Whether a stack of matrices holds ``[in, out]``, where PEFT's ``A`` meets the input."""
        return self.weight.ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes in the file."""
        kind, weight = self.kind, self.weight
        if isinstance(kind, Kernel):
            ones = (1,) * (weight.ndim - 2)
            a: tuple[int, ...] = (rank, weight.shape[1] * kind.groups, *weight.shape[2:])
            b: tuple[int, ...] = (weight.shape[0], rank // kind.groups, *ones)
            return {"a": a, "b": b, "magnitude": (1, weight.shape[0], *ones), "bias": (weight.shape[0],)}
        *stack, out, into = kind.matrix(weight).shape
        if self.swapped:
            out, into = into, out
        rows = rank * (stack[0] if stack else 1)
        return {"a": (rows, into), "b": (out, rows), "magnitude": (out,), "bias": (out,)}

    def decode(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        """Our ``A`` and ``B``; ``None`` where ``A`` reads the channels of all groups, as PEFT's does."""
        groups = self.kind.groups if isinstance(self.kind, Kernel) else 1
        if groups > 1:
            width = self.weight.shape[1]
            blocks = a.unflatten(0, (groups, -1)).unflatten(2, (groups, width))
            own = torch.stack([blocks[j, :, j] for j in range(groups)])
            return (own.flatten(0, 1), b) if int(own.count_nonzero()) == int(a.count_nonzero()) else None
        if self.weight.ndim == 3 and not isinstance(self.kind, Kernel):
            count = self.weight.shape[0]
            a, b = a.unflatten(0, (count, -1)), b.unflatten(1, (-1, count)).permute(2, 0, 1)
            return (b.mT, a.mT) if self.swapped else (a, b)
        return a, b

    def encode(self, adapter: Adapter) -> tuple[Tensor, Tensor, int]:
        """``A`` and ``B`` as they lie in the file, and the rank there."""
        if isinstance(adapter, MixedGroups):
            return adapter.A.detach(), adapter.B.detach(), adapter.A.shape[0]
        a, b = _with_start(adapter, self.kind)
        groups = self.kind.groups if isinstance(self.kind, Kernel) else 1
        if groups > 1:
            width, parts = a.shape[1], a.unflatten(0, (groups, -1))
            wide = a.new_zeros(groups, parts.shape[1], groups * width, *a.shape[2:])
            for j in range(groups):
                wide[j, :, j * width : (j + 1) * width] = parts[j]
            a = wide.flatten(0, 1)
        elif a.ndim == 3 and not isinstance(self.kind, Kernel):
            a, b = (b.mT, a.mT) if self.swapped else (a, b)
            return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), a.shape[1]
        return a, b, a.shape[0]


def _with_start(adapter: Adapter, kind: Kind) -> tuple[Tensor, Tensor]:
    """``[A; A0]`` and ``[B, -B0]``: no modified base is needed."""
    a, b = adapter.A.detach(), adapter.B.detach()
    if adapter.a0 is None or adapter.b0 is None:
        return a, b
    if isinstance(kind, Kernel):
        parts = [t.unflatten(0, (kind.groups, -1)) for t in (a, adapter.a0)]
        return torch.cat(parts, 1).flatten(0, 1), torch.cat([b, -adapter.b0], 1)
    return torch.cat([a, adapter.a0], -2), torch.cat([b, -adapter.b0], -1)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the adapters and the inside of factored layers, by its first name."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in walk_layers(model):
        if isinstance(module, (Bank, Copies)):
            inside = (*inside, f"{name}.")
        elif not (inside and name.startswith(inside)):
            found[name] = module
    return found


def find_slots(model: nn.Module, config: Config) -> tuple[list[Slot], dict[str, int], list[str]]:
    """The weights that a file adapts, how often PEFT wraps each module, and what cannot be adapted."""
    modules = modules_of(model)
    problems: list[str] = []
    targets = [name for name in modules if name and _is_chosen(model, name, modules[name], config)]
    if isinstance(config.target_modules, list):
        for wanted in config.target_modules:
            if not any(_ends(name, wanted) for name in modules):
                problems.append(f"target_modules has {wanted!r}, which the model has not")
    elif config.target_modules is not None and not targets:
        problems.append(f"target_modules is {config.target_modules!r}, which matches nothing in the model")
    places: list[tuple[str, str, str]] = []
    for name in targets:
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is None or config.use_dora or config.lora_bias:
                problems.append(f"{name!r} is an nn.MultiheadAttention with {_attention_trouble(config)}")
            else:
                places += [(name, "in_proj_weight", name), (f"{name}.out_proj", "weight", name)]
        elif not is_plain_target(module) and not is_factored(module):
            problems.append(f"{name!r} is a {type(module).__name__}, which has no LoRA in PEFT")
        elif not any((name, "weight") == place[:2] for place in places):
            places.append((name, "weight", name))
    for wanted in config.target_parameters or ():
        found = [(n, p) for n, p in _parameters(modules) if _ends(f"{n}.{p}", wanted)]
        if not found:
            problems.append(f"target_parameters has {wanted!r}, which the model has not")
        for owner, parameter in found:
            if modules[owner]._parameters[parameter].ndim not in (2, 3):  # type: ignore[union-attr]
                problems.append(f"'{owner}.{parameter}' is no matrix and no stack of matrices")
            elif (owner, parameter, f"{owner}.{parameter}") not in places:
                places.append((owner, parameter, f"{owner}.{parameter}"))
    return *to_slots(modules, places), problems


def to_slots(
    modules: Mapping[str, nn.Module], places: Iterable[tuple[str, str, str]]
) -> tuple[list[Slot], dict[str, int]]:
    """``(module, parameter, label)`` with PEFT's names, where wrapped modules stand below ``base_layer``."""
    places = list(places)
    order = {place: k for k, place in enumerate(_parameters(modules))}
    places.sort(key=lambda place: order.get((place[0], place[1]), -1))
    wraps = Counter(owner for owner, _, _ in places)
    left = Counter(wraps)
    slots = []
    for owner, parameter, label in places:
        left[owner] -= 1  # the last of a module's parameters is the outermost
        slots.append(Slot(owner, parameter, modules[owner], label, peft_path(owner, wraps, left[owner])))
    return slots, dict(wraps)


def peft_path(name: str, wraps: Mapping[str, int], own: int) -> str:
    """The module's name in PEFT's model: every wrapped module on the way has a ``base_layer``."""
    parts = name.split(".")
    path: list[str] = []
    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        path += [part] + ["base_layer"] * (own if last else wraps.get(".".join(parts[: k + 1]), 0))
    return ".".join(path)


def is_plain_target(module: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for it, attention aside."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return not is_factored(module) and (isinstance(module, kinds) or is_conv1d(module))


def saved_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that PEFT keeps a full copy of: every name that ends so, without those inside another."""
    wanted = tuple(names)
    found = [name for name in modules_of(model) if wanted and name.endswith(wanted)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _attention_trouble(config: Config) -> str:
    return "use_dora or lora_bias" if config.use_dora or config.lora_bias else "kdim or vdim, which PEFT cannot adapt"


def _parameters(modules: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    return [
        (name, key)
        for name, module in modules.items()
        if name
        for key, p in module._parameters.items()
        if p is not None
    ]


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _is_chosen(model: nn.Module, name: str, module: nn.Module, config: Config) -> bool:
    exclude, target = config.exclude_modules, config.target_modules
    if exclude:
        if isinstance(exclude, str) and re.fullmatch(exclude, name):
            return False
        if not isinstance(exclude, str) and any(_ends(name, each) for each in exclude):
            return False
    if any(re.match(rf"(^|.*\.){each}($|\..*)", name) for each in config.modules_to_save or ()):
        return False
    if target is None:
        return False
    if isinstance(target, str):
        if target.lower() == "all-linear":
            return _is_all_linear(model, module)
        return re.fullmatch(target, name) is not None
    return any(_ends(name, each) for each in target) and _is_chosen_layer(name, config)


def _is_all_linear(model: nn.Module, module: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (isinstance(module, (nn.Linear, LowRankLinear)) or is_conv1d(module)) and module is not head


def _is_chosen_layer(name: str, config: Config) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    tries = [rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\." for each in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    match = next((found for each in tries if (found := re.match(each, name))), None)
    return match is not None and int(match["idx"]) in (wanted if isinstance(wanted, list) else [wanted])


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by all their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def whole_keys(model: nn.Module, bias: str, saved: Iterable[str], wraps: Mapping[str, int]) -> dict[str, str]:
    """Keys of what a file holds whole, with our names of it: modules, and biases of the base."""
    keys: dict[str, str] = {}
    modules = modules_of(model)
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
    """Keys of the frozen embeddings that PEFT writes where they are adapted or were resized, with our names of them."""
    ends = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    names = [name for name, module in modules_of(model).items() if name and any(module is end for end in ends)]
    return {f"{PREFIX}{peft_path(name, wraps, wraps.get(name, 0))}.weight": f"{name}.weight" for name in names}
