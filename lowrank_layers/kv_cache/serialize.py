"""A layer's cache as names and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from .. import rank as rules
from ..errors import CheckpointError, LowRankError
from .coefficients import Coefficients
from .compressed_tokens import Latent, Part
from .low_rank_kv import LowRankKV
from .recent_tokens import Tail
from .rope import Rotation
from .settings import KVSettings
from .subspace import Subspace

SIDES = ("keys", "values")


def settings_to(settings: KVSettings) -> dict[str, Any]:
    """The settings as json knows them."""
    body = {field.name: getattr(settings, field.name) for field in fields(settings)}
    body["dtype"] = None if settings.dtype is None else str(settings.dtype).removeprefix("torch.")
    return body | {name: _rule_to(body[name]) for name in ("rank", "value_rank")}


def settings_from(body: dict[str, Any]) -> KVSettings:
    """The settings from json."""
    given = body | {name: _rule_from(body[name]) for name in ("rank", "value_rank")}
    given["dtype"] = None if body["dtype"] is None else getattr(torch, body["dtype"])
    return KVSettings(**given)


def layer_to(kv: LowRankKV) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What json can say about a layer, and its tensors; the room for more tokens is left out."""
    tensors = {name: tensor.contiguous() for name, tensor in kv.tensors() if not name.endswith(".tail")}
    if kv.tail is not None:
        tensors |= {f"{side}.tail": tail.read().contiguous() for side, tail in zip(SIDES, kv.tail, strict=True)}
    body: dict[str, Any] = {"tokens": len(kv)}
    if kv.old is not None:
        body["old"] = [_latent_to(latent) for latent in kv.old]
    return body, tensors


def layer_from(
    body: dict[str, Any], tensors: Mapping[str, Tensor], settings: KVSettings, rotation: Rotation | None
) -> LowRankKV:
    """The layer again.

    Raises:
        CheckpointError: if tensors are missing, too many, or do not fit each other.
    """
    left = dict(tensors)
    kv = LowRankKV(settings, rotation)
    if body["tokens"]:
        keys, values = (left.pop(f"{side}.tail") for side in SIDES)
        room = settings.keep_recent + settings.block
        kv.tail = Tail(keys, max(room, keys.shape[2])), Tail(values, max(room, values.shape[2]))
        for tail, x in zip(kv.tail, (keys, values), strict=True):
            tail.append(x)
        if "keys.first" in left:
            kv.first = left.pop("keys.first"), left.pop("values.first")
    if "old" in body:
        old = [_latent_from(part, side, left) for part, side in zip(body["old"], SIDES, strict=True)]
        kv.old = old[0], old[1]
        if {latent.tokens for latent in old} != {kv.compressed}:
            raise CheckpointError("keys and values have different lengths")
    if left or len(kv) != body["tokens"]:
        raise CheckpointError(f"got {len(kv)} of {body['tokens']} tokens, and beside them {sorted(left)}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointError("NaN or Inf among the entries")
    return kv


def _latent_to(latent: Latent) -> dict[str, Any]:
    parts = [
        {
            "heads": part.heads if isinstance(part.heads, list) else None,
            "size": part.size,
            "dtype": str(part.coefficients.dtype).removeprefix("torch."),
        }
        for part in latent.parts
    ]
    return {"discarded": latent.discarded, "parts": parts}


def _latent_from(body: dict[str, Any], side: str, left: dict[str, Tensor]) -> Latent:
    parts = []
    for index, part in enumerate(body["parts"]):
        take = f"{side}.{index}."
        subspace = Subspace(left.pop(f"{take}basis"), left.pop(f"{take}mean"))
        coefficients = Coefficients.__new__(Coefficients)
        coefficients.dtype = getattr(torch, part["dtype"])
        coefficients.values, coefficients.scales = left.pop(f"{take}values"), left.pop(f"{take}scales", None)
        coefficients.apply(lambda t: t)
        wide, rank = subspace.basis.shape[2:]
        if wide % part["size"] or rank != coefficients.rank or subspace.mean.shape[2] != wide:
            raise CheckpointError(f"the bases of {take} do not fit their coefficients")
        parts.append(
            Part(slice(None) if part["heads"] is None else part["heads"], part["size"], subspace, coefficients)
        )
    return Latent(parts, body["discarded"])


def _rule_to(rank: object) -> Any:
    if rank is None or isinstance(rank, int):
        return rank
    name = type(rank).__name__
    if getattr(rules, name, None) is not type(rank) or not is_dataclass(rank) or isinstance(rank, type):
        raise LowRankError(f"save: got the rank rule {rank!r}, expected an integer or one of lowrank_layers' rules.")
    return [name, {field.name: getattr(rank, field.name) for field in fields(rank)}]


def _rule_from(body: Any) -> Any:
    return getattr(rules, body[0])(**body[1]) if isinstance(body, list) else body
