"""A layer's cache as a body for json and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LowRankError
from ..rank.effective_rank import EffectiveRank
from ..rank.elbow import Elbow
from ..rank.energy import Energy, RelativeError
from ..rank.evbmf import EVBMF
from ..rank.gavish_donoho import GavishDonoho
from ..rank.rank_fraction import RankFraction
from ..rank.residual_whiteness import ResidualWhiteness
from ..rank.size import ParameterFraction
from ..rank.stable_rank import StableRank
from .bit_coefficients import BitCoefficients
from .coefficients import Coefficients, coefficients_for
from .compressed_tokens import CompressedTokens, HeadGroups
from .low_rank_kv import SIDES, LowRankKV
from .quantizers import WIDTHS
from .recent_tokens import RecentTokens
from .rope import Rotation
from .settings import KVSettings
from .subspace import Subspace
from .tile_frame import TileFrame

_MATRIX_RULES = (
    *(Energy, RelativeError, ParameterFraction, RankFraction),
    *(EVBMF, GavishDonoho, ResidualWhiteness, Elbow, StableRank, EffectiveRank),
)
RULES = {rule.__name__: rule for rule in _MATRIX_RULES}
"""The rank rules that a file can name."""


def settings_to_json(settings: KVSettings) -> dict[str, Any]:
    """The settings as json knows them.

    Args:
        settings: the settings of a cache.
    """
    body = {field.name: getattr(settings, field.name) for field in fields(settings)}
    body["dtype"] = None if settings.dtype is None else _dtype_to_json(settings.dtype)
    return body | {name: _rank_to_json(body[name]) for name in ("rank", "value_rank")}


def settings_from_json(body: dict[str, Any]) -> KVSettings:
    """Inverse of :func:`settings_to_json`.

    Args:
        body: what it returned.
    """
    given = body | {name: _rank_from_json(body[name]) for name in ("rank", "value_rank")}
    given["dtype"] = None if body["dtype"] is None else getattr(torch, body["dtype"])
    return KVSettings(**given)


def layer_to_tensors(kv: LowRankKV) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer's cache as a body for json and named tensors; the room for more tokens is left out.

    Args:
        kv: the cache of the layer.
    """
    tensors = {name: tensor.contiguous() for name, tensor in kv.tensors() if not name.endswith((".tail", ".room"))}
    if kv.recent is not None:
        tensors |= {f"{side}.tail": recent.read().contiguous() for side, recent in zip(SIDES, kv.recent, strict=True)}
    body: dict[str, Any] = {"tokens": len(kv)}
    if kv.old is not None:
        body["old"] = [_side_to_json(side) for side in kv.old]
    return body, tensors


def layer_from_tensors(
    body: dict[str, Any], tensors: Mapping[str, Tensor], settings: KVSettings, rotation: Rotation | None
) -> LowRankKV:
    """Inverse of :func:`layer_to_tensors`.

    Args:
        body: the body that it returned.
        tensors: the tensors that it returned.
        settings: settings of the cache.
        rotation: the rotation of its keys.

    Raises:
        CheckpointError: if tensors are missing, too many, or do not fit each other.
    """
    left = dict(tensors)
    kv = LowRankKV(settings, rotation)
    if body["tokens"]:
        keys, values = (left.pop(f"{side}.tail") for side in SIDES)
        room = settings.recent + settings.block_on(keys.device)
        kv.recent = RecentTokens(keys, max(room, keys.shape[2])), RecentTokens(values, max(room, values.shape[2]))
        for recent, x in zip(kv.recent, (keys, values), strict=True):
            recent.append(x)
        if "keys.first" in left:
            kv.first = left.pop("keys.first"), left.pop("values.first")
        if "keep" in left:
            keep = kv.padding.keep = left.pop("keep")
            if keep.dtype != torch.bool or keep.ndim != 2 or len(keep) != len(keys):
                raise CheckpointError("what says which tokens are padding does not fit the batch")
            kv.padding.find_starts()
    if "old" in body:
        old = [_side_from_json(part, side, left, rotation) for part, side in zip(body["old"], SIDES, strict=True)]
        kv.old = old[0], old[1]
        if {side.tokens for side in old} != {kv.compressed}:
            raise CheckpointError("keys and values have different lengths")
    if left or len(kv) != body["tokens"]:
        raise CheckpointError(f"got {len(kv)} of {body['tokens']} tokens, and beside them {sorted(left)}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointError("NaN or Inf among the entries")
    kv.hide(None)
    return kv


def _side_to_json(side: CompressedTokens) -> dict[str, Any]:
    parts = []
    for part in side.parts:
        store, subspace = part.coefficients, part.subspace
        body: dict[str, Any] = {
            "heads": part.heads if isinstance(part.heads, list) else None,
            "size": part.size,
            "judged": list(part.judged),
            "dtype": _dtype_to_json(store.dtype),
        }
        if isinstance(store, BitCoefficients):
            body["widths"] = list(store.widths)
        if subspace.frame is not None:
            body["tile"] = True
        parts.append(body)
    return {"discarded": side.discarded, "parts": parts}


def _side_from_json(
    body: dict[str, Any], side: str, left: dict[str, Tensor], rotation: Rotation | None
) -> CompressedTokens:
    """Takes the tensors of keys or of values out of those that are left."""
    parts = []
    for index, part in enumerate(body["parts"]):
        prefix = f"{side}.{index}."
        frame = TileFrame(_known(rotation), part["size"]) if part.get("tile") else None
        basis, mean = (left.pop(f"{prefix}{name}") for name in ("basis", "mean"))
        scale, metric = (left.pop(f"{prefix}{name}", None) for name in ("scale", "metric"))
        subspace = Subspace(basis, mean, scale, metric, frame)
        codes = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
        coefficients = _store(part, codes)
        wide, rank = subspace.basis.shape[2:]
        held = coefficients.read(0, 1, torch.float32).shape[2]
        if wide % part["size"] or rank != held or subspace.mean.shape[2] != wide:
            raise CheckpointError(f"the bases of {prefix} do not fit their coefficients")
        heads = slice(None) if part["heads"] is None else part["heads"]
        seen, badly = (int(number) for number in part["judged"])
        parts.append(HeadGroups(heads, part["size"], subspace, coefficients, (seen, badly)))
    return CompressedTokens(parts, body["discarded"])


def _store(part: dict[str, Any], codes: dict[str, Tensor]) -> Coefficients:
    dtype = getattr(torch, part["dtype"])
    if "widths" in part:
        weights = codes.pop("weights")
        empty: Coefficients = BitCoefficients(_widths(part["widths"]), weights)
        names = set(empty.encode(torch.zeros(*weights.shape, 1)))
    else:
        empty = coefficients_for(dtype)
        names = set(empty.encode(torch.zeros(1, 1, 1, 1)))
    if set(codes) != names or len({code.shape[-1] for code in codes.values()}) != 1:
        raise CheckpointError(f"coefficients in {dtype} are {sorted(codes)}, expected {sorted(names)} of one length")
    empty.append_codes(codes)
    return empty


def _widths(stored: list[int]) -> list[int]:
    """Numbers of directions by bits; older files know no 3 bits."""
    return [*stored[:2], 0, *stored[2:]] if len(stored) == len(WIDTHS) - 1 else stored


def _known(rotation: Rotation | None) -> Rotation:
    if rotation is None:
        raise CheckpointError("keys are stored in the frame of their tile, but their rotation is missing")
    return rotation


def _dtype_to_json(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rank_to_json(rank: Any) -> Any:
    if rank is None or isinstance(rank, int):
        return rank
    name = type(rank).__name__
    if RULES.get(name) is not type(rank):
        raise LowRankError(f"save: got the rank rule {rank!r}, expected an integer or one of {', '.join(RULES)}.")
    return [name, {field.name: getattr(rank, field.name) for field in fields(rank)}]


def _rank_from_json(body: Any) -> Any:
    return RULES[body[0]](**body[1]) if isinstance(body, list) else body
