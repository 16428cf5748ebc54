"""The names that Stable Diffusion's original code has for the layers of diffusers' U-Net."""

from __future__ import annotations

import re
from collections.abc import Sequence

_INSIDE = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original_names(names: Sequence[str]) -> dict[str, str]:
    """The names of a U-Net's layers in diffusers by their names in the original code; empty for another model.

    With ``L`` layers per block, ``down_blocks.i`` holds the input blocks ``(L + 1) i + 1`` to ``(L + 1) (i + 1)``, and
    ``up_blocks.i`` the output blocks ``(L + 1) i`` to ``(L + 1) i + L``.

    Args:
        names: names of the layers in the model.
    """
    firsts = [re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name) for name in names]
    layers = 1 + max((int(match[1]) for match in firsts if match), default=-1)
    if not layers:
        return {}
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    found = {}
    for name in names:
        own = _ENDS.get(name) or _original(name, layers + 1, attending)
        if own:
            found[own] = name
    return found


def _original(name: str, step: int, attending: set[str]) -> str | None:
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        way, block, kind, layer, rest = match.groups()
        inner = f"{int(kind == 'attentions')}.{_INSIDE.get(rest, rest)}"
        if way == "down":
            return f"input_blocks.{step * int(block) + int(layer) + 1}.{inner}"
        return f"output_blocks.{step * int(block) + int(layer)}.{inner}"
    match = re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name)
    if match:
        return f"input_blocks.{step * (int(match[1]) + 1)}.0.op"
    match = re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name)
    if match:
        return f"output_blocks.{step * int(match[1]) + step - 1}.{1 + (match[1] in attending)}.conv"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if match:
        kind, layer, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{_INSIDE.get(rest, rest)}"
    return None
