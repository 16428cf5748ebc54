"""Layers described in plain values, as files hold them: enough to compare, price and build them without the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import LowRankError, MissingExtraError
from . import (
    FACTORED_LAYERS,
    INT8_LAYERS,
    FactoredModule,
    Int8Layer,
    LowRankTransposedLinear,
    bias_of,
    bits_of,
    round_factors_,
)

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    **{f"Conv{d}d": _CONV for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (*_CONV, "output_padding") for d in (1, 2, 3)},
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "EmbeddingBag": ("num_embeddings", "embedding_dim", "padding_idx", "mode", "include_last_offset"),
    "Conv1D": ("nf", "nx"),
    **{f"BatchNorm{d}d": ("num_features", "eps", "momentum", "affine", "track_running_stats") for d in (1, 2, 3)},
}
_NO_BIAS_ARGUMENT = ("Embedding", "EmbeddingBag", "Conv1D", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")

Spec = dict[str, Any]
"""The settings of a dense layer: ``{"type": "Linear", "in_features": ..., "bias": True, "dtype": "float32"}``."""


def describe(module: nn.Module) -> Spec:
    """Returns the settings of a dense layer that can be factorized, or of a batch norm; adapters are left out."""
    names = [each.__name__ for each in type(module).__mro__]
    kind = next((name for name in names if name in _SETTINGS), names[0])
    spec: Spec = {"type": kind}
    for name in _SETTINGS[kind]:
        value = getattr(module, name)
        spec[name] = list(value) if isinstance(value, tuple) else value
    if kind not in _NO_BIAS_ARGUMENT:
        spec["bias"] = module.bias is not None
    spec["dtype"] = str(next(iter(module.state_dict().values())).dtype).removeprefix("torch.")
    return spec


def blank(spec: Spec) -> nn.Module:
    """Returns the described layer on the meta device.

    Raises:
        LowRankError: for an unknown type, or settings that torch refuses.
    """
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k not in ("type", "dtype")}
    dtype = getattr(torch, str(spec.get("dtype")), None)
    if spec.get("type") not in _SETTINGS or not isinstance(dtype, torch.dtype):
        raise LowRankError(f"got the layer description {spec!r}, expected a type out of {sorted(_SETTINGS)}.")
    try:
        if spec["type"] == "Conv1D":
            return LowRankTransposedLinear.blank(spec["nf"], spec["nx"], "meta", dtype)
        module: nn.Module = getattr(nn, spec["type"])(**settings, device="meta", dtype=dtype)
    except MissingExtraError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise LowRankError(f"got the layer description {spec!r}, which torch.nn refuses: {error}") from None
    return module


@dataclass(frozen=True)
class FactoredSpec:
    """A factored layer, or one in int8, in plain values.

    Args:
        type: name of its class.
        rank: its rank; ``None`` for a layer in int8.
        bias: whether it has a bias.
        form: what tells it from other layers of its class beside the rank; see :attr:`FactoredModule.form`.
        dense: the settings of the dense layer that it stands for.
        bits: 8 for factors in int8; ``None`` for those in floating point.
    """

    type: str
    rank: Any
    bias: bool
    form: dict[str, Any]
    dense: Spec
    bits: int | None = None

    @classmethod
    def of(cls, layer: FactoredModule | Int8Layer) -> FactoredSpec:
        """Returns the description of a layer."""
        bias, bits = bias_of(layer) is not None, bits_of(layer) if isinstance(layer, FactoredModule) else None
        return cls(type(layer).__name__, layer.rank, bias, dict(layer.form), describe(layer.dense_twin()), bits)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return {name: value for name, value in asdict(self).items() if name != "bits" or value is not None}

    @classmethod
    def from_json(cls, values: Any) -> FactoredSpec:
        """Inverse of :meth:`to_json`, after a file has turned tuples into lists.

        Raises:
            LowRankError: if a field is missing or unknown, or the class is.
        """
        try:
            spec = cls(**values)
            rank = tuple(spec.rank) if isinstance(spec.rank, list) else spec.rank
            known = cls(spec.type, rank, spec.bias, dict(spec.form), dict(spec.dense), spec.bits)
            imported = spec.type in FACTORED_LAYERS or spec.type in INT8_LAYERS
            if spec.bits not in (None, 8):
                raise ValueError("bits")
        except (TypeError, ValueError):
            raise LowRankError(f"its description {values!r} is damaged or newer.") from None
        if not imported:
            raise LowRankError(
                f"its class {known.type!r} is unknown; import the module that defines it first, or update the package."
            )
        return known

    def check_fits(self, dense: nn.Module) -> None:
        """Raises if the dense layer is another one than the described layer stands for."""
        kind = self.kind
        if not kind.stands_for(dense):
            raise LowRankError(
                f"replaces {kind.dense_name()}, but the model has a {type(dense).__name__}; it is for another model."
            )
        own = describe(dense)
        different = [
            f"{key} {value!r} (the model: {own.get(key)!r})"
            for key, value in self.dense.items()
            if own.get(key) != value and key != "bias"
        ]
        if different:
            raise LowRankError(f"was saved with {', '.join(different)}; it is for another model.")

    @property
    def kind(self) -> Any:
        """The class of the layer."""
        return {**FACTORED_LAYERS, **INT8_LAYERS}[self.type]

    def like(self, dense: nn.Module) -> FactoredModule | Int8Layer:
        """Returns the described layer in the place of ``dense``, on its device, uninitialized."""
        try:
            layer: FactoredModule | Int8Layer = self.kind.like(dense, rank=self.rank, bias=self.bias, **self.form)
            if self.bits is not None and isinstance(layer, FactoredModule):
                round_factors_(layer, filled=False)
        except (LowRankError, TypeError, ValueError, AssertionError) as error:
            raise LowRankError(str(error)) from None
        return layer
