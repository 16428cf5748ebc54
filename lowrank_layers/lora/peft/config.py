"""The settings in PEFT's ``adapter_config.json``: what they mean, and which of them are not supported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...checks import is_integer, is_number

NOTHING = "dummy-target-modules"
"""PEFT's ``target_modules`` for an adapter without LoRA layers, which trains only tokens."""
BIASES = ("none", "all", "lora_only")
# inits that leave the base unchanged, so that the file holds all that was learned
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# settings that say nothing about what is computed once the adapter is there
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
}
_HARMLESS |= {"loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size"}
_HARMLESS |= {"revision", "runtime_config", "task_type"}


@dataclass
class Config:
    """The settings of ``adapter_config.json`` that decide what is computed, under PEFT's names."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def rank(self, label: str) -> int:
        """The rank of the layer of that name."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, label), self.r)

    def scaling(self, label: str) -> float:
        """What its product is multiplied by."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, label), self.lora_alpha)
        return float(alpha / (self.rank(label) ** 0.5 if self.use_rslora else self.rank(label)))

    def unmatched(self, labels: Iterable[str]) -> dict[str, list[str]]:
        """The keys of patterns that match none of these layers, by the name of their setting."""
        names = list(labels)
        patterns: dict[str, Iterable[str]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        found = {
            setting: [key for key in pattern if not any(_fits(key, name) for name in names)]
            for setting, pattern in patterns.items()
        }
        return {setting: keys for setting, keys in found.items() if keys}


def config_of(body: Any) -> tuple[Config, list[str]]:
    """The settings in a parsed ``adapter_config.json``, and what is wrong with them, in words."""
    if not isinstance(body, dict):
        return Config(), [f"it holds a {type(body).__name__}, expected settings by name"]
    if body.get("peft_type") != "LORA":
        return Config(), [f"peft_type is {body.get('peft_type')!r}, expected 'LORA'"]
    config, problems = Config(), []
    for key, value in body.items():
        if key in Config.__dataclass_fields__:
            if value is None and key in ("rank_pattern", "alpha_pattern"):
                continue
            if not _VALID[key](value):
                problems.append(f"{key} is {value!r}, expected {_EXPECTED.get(key, 'a name, a list of names or null')}")
            setattr(config, key, [] if key == "target_modules" and value == NOTHING else value)
        elif key not in _HARMLESS and value not in (None, False, {}, [], ""):
            problems.append(f"{key} is set ({value!r}), which changes what is computed and is not supported")
    if config.init_lora_weights not in _HARMLESS_INITS:
        problems.append(
            f"init_lora_weights is {config.init_lora_weights!r}: this adapter goes with a base whose weights that init"
            " changed; save it again with path_initial_model_for_weight_conversion, which makes it fit the plain base"
        )
    if config.target_modules is None and not config.target_parameters and not config.trainable_token_indices:
        problems.append("target_modules is missing")
    return config, problems


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_name, value)))


def _is_rank(value: Any) -> bool:
    return is_integer(value, 1)


def _is_number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


def _all_regex(values: Any) -> bool:
    return all(map(_is_regex, values or ()))


def _is_pattern(check: Any) -> Any:
    return lambda value: isinstance(value, dict) and all(_is_regex(k) and check(v) for k, v in value.items())


def _is_target(value: Any) -> bool:
    return _is_names(value) and (not isinstance(value, str) or _is_regex(value))


def _is_index(value: Any) -> bool:
    return value is None or _is_rank(value + 1 if isinstance(value, int) else value)


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_name(key) and isinstance(own, list) and _are_tokens(own) for key, own in value.items())
    return value is None or (isinstance(value, list) and all(map(_is_index, value)) and None not in value)


_VALID = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "rank_pattern": _is_pattern(_is_rank),
    "alpha_pattern": _is_pattern(_is_number),
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "lora_bias": _is_flag,
    "bias": lambda value: value in BIASES,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "init_lora_weights": lambda value: isinstance(value, (bool, str)),
    "target_modules": _is_target,
    "exclude_modules": _is_target,
    "layers_to_transform": lambda value: all(map(_is_index, value)) if isinstance(value, list) else _is_index(value),
    "layers_pattern": lambda value: _is_names(value) and _all_regex([value] if isinstance(value, str) else value),
    "modules_to_save": lambda value: _is_names(value) and not isinstance(value, str) and _all_regex(value),
    "target_parameters": lambda value: _is_names(value) and not isinstance(value, str),
    "trainable_token_indices": _are_tokens,
}
_EXPECTED = {
    "r": "an integer of at least 1",
    "lora_alpha": "a number",
    "rank_pattern": "ranks by regular expression",
    "alpha_pattern": "numbers by regular expression",
    "bias": f"one of {list(BIASES)}",
    "lora_dropout": "a number in [0, 1)",
    "layers_to_transform": "a layer's index or a list of them",
    "trainable_token_indices": "indices, or lists of them by name",
} | dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), "true or false")


def _pattern_key(patterns: Iterable[str], label: str) -> str:
    return next((key for key in patterns if _fits(key, label)), label)


def _fits(key: str, label: str) -> bool:
    """Whether the key of a pattern, a regular expression, means the layer of that name."""
    return re.match(rf"(.*\.)?({key})$", label) is not None
