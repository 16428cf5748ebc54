"""The entry ``quantization_config`` of a ``config.json``, from which transformers builds a factored model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, LowRankError
from ..layers.config import FactoredSpec, blank
from .description import ModelDescription

QUANT_METHOD = "lowrank"
"""The name that the format has in transformers."""
VERSION = 1


def to_quantization_config(description: ModelDescription) -> dict[str, Any]:
    """Returns a description as the values of the entry.

    They say what each low-rank layer is, and not what it stands for: that is the layer which the rest of
    ``config.json`` describes.

    Args:
        description: of the factored model.

    Examples:
        >>> from lowrank_layers.modules import ModelDescription, to_quantization_config
        >>> model = nn.Sequential(lr.LowRankLinear(64, 32, rank=4))
        >>> to_quantization_config(ModelDescription.of(model))["layers"]
        {'0': {'type': 'LowRankLinear', 'rank': 4, 'bias': True}}
    """
    values: dict[str, Any] = {"quant_method": QUANT_METHOD, "version": VERSION}
    values["layers"] = {name: _to_json(spec) for name, spec in description.layers.items()}
    if description.opened:
        values["unfused"] = list(description.opened)
    if description.resized:
        values["resized"] = {name: dict(spec) for name, spec in description.resized.items()}
    return values


def from_quantization_config(values: Mapping[str, Any]) -> ModelDescription:
    """Inverse of :func:`to_quantization_config`, after JSON has turned tuples into lists.

    Args:
        values: the values of the entry.

    Raises:
        CheckpointError: for another version, layers of an unknown class, and values that are damaged.
    """
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"config.json: its quantization_config is of version {values.get('version')!r} of the format"
            f" {QUANT_METHOD!r}, expected {VERSION}; update lowrank-layers."
        )
    unknown = set(values) - {"quant_method", "version", "layers", "unfused", "resized"}
    if unknown:
        raise CheckpointError(
            f"config.json: its quantization_config has the unknown entry {min(unknown)!r}; update lowrank-layers."
        )
    layers, opened, resized = values.get("layers"), values.get("unfused", ()), values.get("resized", {})
    if not (isinstance(layers, Mapping) and isinstance(resized, Mapping) and isinstance(opened, (list, tuple))):
        raise CheckpointError(
            "config.json: its quantization_config is damaged, expected a dict of layers; save it again."
        )
    specs = {}
    for name, each in layers.items():
        try:
            specs[name] = _from_json(each)
        except LowRankError as error:
            raise CheckpointError(f"config.json: {name!r}: {error}") from None
    for name, each in resized.items():
        _check_resized(name, each)
    return ModelDescription(specs, tuple(opened), dict(resized))


def _to_json(spec: FactoredSpec) -> dict[str, Any]:
    form = {"form": dict(spec.form)} if spec.form else {}
    bits = {} if spec.bits is None else {"bits": spec.bits}
    return {"type": spec.type, "rank": spec.rank, "bias": spec.bias, **form, **bits}


def _from_json(values: Any) -> FactoredSpec:
    if not isinstance(values, Mapping):
        raise LowRankError(f"its description {values!r} is damaged or newer.")
    return FactoredSpec.from_json({"form": {}, **values, "dense": {}})


def _check_resized(name: str, values: Any) -> None:
    """Raises unless the values are the settings of a layer."""
    try:
        if not isinstance(values, Mapping):
            raise LowRankError(f"its description {values!r} is damaged or newer.")
        blank(dict(values))
    except LowRankError as error:
        raise CheckpointError(f"config.json: {name!r}: {error}") from None
