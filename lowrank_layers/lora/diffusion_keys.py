"""The keys of LoRA files of diffusers, kohya's scripts and ComfyUI: which model, which layer, which part they mean."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

_DOWN = (
    r"\.lora_down\.weight",
    r"_lora\.down\.weight",
    r"\.lora\.down\.weight",
    r"\.lora_linear_layer\.down\.weight",
    r"\.lora_A(\.[^.]+)?\.weight",
    r"\.lora_A",
)
_UP = tuple(end.replace("down", "up").replace("_A", "_B") for end in _DOWN)
_PARTS = {
    "a": _DOWN,
    "b": _UP,
    "alpha": (r"\.alpha",),
    "magnitude": (r"\.dora_scale", r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?"),
}
_SUFFIXES = {part: re.compile(rf"(?P<path>.+?)({'|'.join(ends)})") for part, ends in _PARTS.items()}
_FOREIGN = {
    r".*\.lora_mid\.weight": "a convolution with a core (LoCon with lora_mid), which is no product of two factors",
    r".*\.hada_[wt]\d(_[ab])?": "a Hadamard product (LoHa)",
    r".*\.lokr_[wt]\d(_[ab])?": "a Kronecker product (LoKr)",
    r".*\.(oft_\w+|boft_\w+)(\.weight)?": "an orthogonal transformation (OFT)",
    r".*\.[ab][12]\.weight": "GLoRA",
    r".*\.(diff|diff_b|set_weight|w_norm|b_norm)": "the difference of a whole parameter",
    r".*\.(reshape_weight)": "a weight of another shape",
    r".*\.lora_[BA](\.[^.]+)?\.bias": "a bias of an adapter",
}
_FLAT = re.compile(r"(?P<prefix>lora_(?:prior_)?(?:unet|transformer|te\d?)|lycoris)_(?P<path>.+)")
_DOTTED = re.compile(
    r"(?P<prefix>(?:model\.)?diffusion_model|unet|prior|transformer(?:_\d)?|text_encoder(?:_\d)?"
    r"|text_encoders\.[^.]+(?:\.transformer)?)\.(?P<path>.+)"
)
_PROCESSOR = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_WRAPPERS = ("", "model.", "text_model.")


@dataclass
class Component:
    """The adapters that a file has for one of the models of a pipeline.

    Args:
        prefix: prefix of the keys that belong to the model.
        parts: the parts of each adapter (``a``, ``b``, ``alpha``, ``magnitude``) by its name in the file.
        flat: whether names have ``_`` in place of ``.``, as kohya's.
    """

    prefix: str
    parts: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    flat: bool = False


def is_diffusion_file(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of diffusers, kohya or ComfyUI, and not PEFT's, loralib's or torchtune's."""
    if any(key.startswith("base_model.model.") for key in tensors):
        return False
    ends = (*_DOWN[:-1], *_UP[:-1], *_FOREIGN)
    return any(re.fullmatch(rf".+?{end}", key) for key in tensors for end in ends)


def components_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Component], list[str]]:
    """The parts of every adapter by the prefix of their model, and what else the file holds, in words."""
    components: dict[str, Component] = {}
    problems = []
    for key, tensor in tensors.items():
        foreign = next((what for pattern, what in _FOREIGN.items() if re.fullmatch(pattern, key)), None)
        if foreign:
            problems.append(f"{key!r} is {foreign}, which is not supported")
            continue
        found = [(part, match["path"]) for part, regex in _SUFFIXES.items() if (match := regex.fullmatch(key))]
        if not found:
            problems.append(f"unknown {key!r}")
            continue
        part, path = found[0]
        flat, dotted = _FLAT.fullmatch(path), _DOTTED.fullmatch(path)
        match = flat or dotted
        name = match["prefix"] if match else ""
        component = components.setdefault(name, Component(name, flat=flat is not None))
        component.parts[match["path"] if match else path][part] = tensor
    return components, problems


def spellings(prefix: str, name: str, separator: str) -> Iterator[str]:
    """The names that a model may have for a layer of a file.

    Args:
        prefix: prefix of the layer's keys.
        name: name of the layer in the file, behind the prefix.
        separator: what stands between the parts of the name, ``"."`` or kohya's ``"_"``.
    """
    plain = name.replace(".processor.", ".")
    head, _, last = plain.rpartition(".")
    own = [name, plain, *([f"{head}.{_PROCESSOR[last]}"] if last in _PROCESSOR else [])]
    own += [f"{plain}.0"] if last == "to_out" else []
    for each in own:
        if separator == ".":
            yield f"{prefix}.{each}"
        for wrapper in _WRAPPERS:
            flat = wrapper.replace(".", separator)
            yield each.removeprefix(flat)
            yield flat + each


def naming_of(name: str) -> str:
    """Words for the naming scheme of a layer, where its name tells that."""
    flat = name.replace(".", "_")
    if re.match(r"(input_blocks|middle_block|output_blocks)_", flat):
        return " (the naming of Stable Diffusion's original code)"
    if re.match(r"(double_blocks|single_blocks)_", flat):
        return " (the naming of Flux's original code)"
    if re.match(r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)_", flat):
        return " (the naming of diffusers)"
    return ""
