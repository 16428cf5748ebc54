"""Which weights of a model the settings of PEFT select."""

from __future__ import annotations

import re

from torch import nn

from ...layers import LowRankLinear, is_compressed
from ..adapted_weight import AdaptedWeight, base_modules
from ..weight_layout import is_conv1d
from .config import Config
from .keys import PeftWeight, is_plain_target, named_parameters, peft_weights


def find_weights(model: nn.Module, config: Config) -> tuple[list[PeftWeight], dict[str, int], list[str]]:
    """The weights that settings select, how often PEFT wraps each module, and what cannot be adapted, in words."""
    modules = base_modules(model)
    problems: list[str] = []
    selected = [name for name in modules if name and _is_selected(model, name, modules[name], config)]
    if isinstance(config.target_modules, list):
        for wanted in config.target_modules:
            if not any(_ends(name, wanted) for name in modules):
                problems.append(f"target_modules has {wanted!r}, which the model has not")
    elif config.target_modules is not None and not selected:
        problems.append(f"target_modules is {config.target_modules!r}, which matches nothing in the model")
    labels: dict[AdaptedWeight, str] = {}
    for name in selected:
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention):
            if module.in_proj_weight is None or config.use_dora or config.lora_bias:
                problems.append(f"{name!r} is an nn.MultiheadAttention with {_attention_trouble(config)}")
            else:
                labels[AdaptedWeight(name, "in_proj_weight", module)] = name
                labels[AdaptedWeight(f"{name}.out_proj", "weight", module.out_proj)] = name
        elif not is_plain_target(module) and not is_compressed(module):
            problems.append(f"{name!r} is a {type(module).__name__}, which has no LoRA in PEFT")
        else:
            labels.setdefault(AdaptedWeight(name, "weight", module), name)
    for wanted in config.target_parameters or ():
        found = [AdaptedWeight(n, p, modules[n]) for n, p in named_parameters(modules) if _ends(f"{n}.{p}", wanted)]
        if not found:
            problems.append(f"target_parameters has {wanted!r}, which the model has not")
        for weight in found:
            if weight.base.ndim not in (2, 3):
                problems.append(f"{weight.name!r} is no matrix and no stack of matrices")
            elif labels.setdefault(weight, weight.name) != weight.name:
                problems.append(f"{weight.name!r} is selected by target_modules and by target_parameters")
    return *peft_weights(modules, labels), problems


def _attention_trouble(config: Config) -> str:
    return "use_dora or lora_bias" if config.use_dora or config.lora_bias else "kdim or vdim, which PEFT cannot adapt"


def _is_selected(model: nn.Module, name: str, module: nn.Module, config: Config) -> bool:
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
            return _is_linear_but_head(model, module)
        return re.fullmatch(target, name) is not None
    return any(_ends(name, each) for each in target) and _is_in_selected_layer(name, config)


def _is_linear_but_head(model: nn.Module, module: nn.Module) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (isinstance(module, (nn.Linear, LowRankLinear)) or is_conv1d(module)) and module is not head


def _is_in_selected_layer(name: str, config: Config) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    tries = [rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\." for each in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    match = next((found for each in tries if (found := re.match(each, name))), None)
    return match is not None and int(match["idx"]) in (wanted if isinstance(wanted, list) else [wanted])


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
