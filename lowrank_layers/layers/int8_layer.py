"""What layers with a weight in int8 have in common: codes, and one scale per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LowRankError, UnsupportedLayerError
from ..linalg import check_tensor
from .base import refuse_scripting
from .computed_weight import computed
from .conversion import carry_attributes, match_bias, return_attributes
from .instance_checks import peculiarity
from .weights import bias_of, meta_twin, weight_of

LARGEST = 127
"""The largest code; the smallest is its negative."""

Self = TypeVar("Self", bound="Int8Layer")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to int8 with a scale per row: its largest entry over 127, so that errors are at most half of it.

    Args:
        weight: ``[m, n]``, of floating point.

    Returns:
        The codes ``[m, n]`` in int8 and the scales ``[m]`` in fp32; the scale of a row that is zero is zero.

    Examples:
        >>> from lowrank_layers.layers.int8_layer import quantize_rows
        >>> codes, scale = quantize_rows(torch.tensor([[0.0, -2.54, 1.0], [0.0, 0.0, 0.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[0, -127, 50], [0, 0, 0]], [0.019999999552965164, 0.0])
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = exact.abs().amax(1) if weight.shape[1] else exact.new_zeros(len(exact))
    scale = (largest / LARGEST).float()
    steps = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (exact / steps[:, None]).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scale


class Int8Layer(nn.Module):
    """What :class:`Int8Linear` and :class:`Int8Embedding` have in common: a weight of codes and scales."""

    dense_type: ClassVar[type[nn.Module]]
    """The torch class that this layer replaces."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    rank = None
    """It has none: its weight is whole."""

    def _hold(self, rows: int, columns: int, device: Any, dtype: torch.dtype | None) -> None:
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("codes", torch.empty(rows, columns, device=device, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows, device=device, dtype=torch.float32))

    @property
    def form(self) -> dict[str, Any]:
        """Keywords of ``like`` besides the bias: none."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The weight in the layer's dtype, computed on every access and read-only."""
        return computed(self.dequantized(), self._read_only())

    def dequantized(self) -> Tensor:
        """Returns the codes times the scales of their rows, in the layer's dtype."""
        codes = self.codes.double() if self.dtype == torch.float64 else self.codes
        return (codes * self.scale[:, None]).to(self.dtype)

    def _read_only(self) -> str:
        return (
            f"{type(self).__name__}: its weight is computed from int8 codes on every access, so that what is written to"
            " it would be lost; make the layer dense first (to_dense(), or densify_ for a model), or take a copy with"
            " .detach().clone()."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise LowRankError(self._read_only())
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts the layer's dtype; the scales stay in fp32, since an error of theirs would be one of whole rows."""
        exact = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=exact.device)).dtype
        if self.scale.dtype != torch.float32:
            self.scale = exact.to(self.scale.device)
        return self

    @torch.no_grad()
    def fill_(self: Self, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Rounds a weight into the layer, and copies a bias.

        Args:
            weight: of the shape of the layer's weight.
            bias: the bias; ``None`` sets it to zero where there is one.

        Returns:
            The layer itself.
        """
        codes, scale = quantize_rows(weight)
        self.codes.copy_(codes)
        self.scale.copy_(scale)
        own = bias_of(self)
        if own is not None:
            own.zero_() if bias is None else own.copy_(bias)
        return self

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Returns whether this layer replaces ``module``: an instance of ``dense_type``, not of a subclass.

        An embedding that changes its weight as it runs (``max_norm``) is not replaced.
        """
        return type(module) is cls.dense_type and getattr(module, "max_norm", None) is None

    @classmethod
    def dense_name(cls) -> str:
        """Name of the dense layer for messages."""
        return f"nn.{cls.dense_type.__name__}"

    @classmethod
    def like(cls: type[Self], dense: nn.Module, *, rank: None = None, bias: bool | None = None) -> Self:
        """Builds an **uninitialized** layer with the settings, device and dtype of ``dense``.

        Args:
            dense: the layer to imitate.
            rank: ``None``.
            bias: whether the layer has a bias; by default it has one if ``dense`` does.
        """
        raise LowRankError(f"{cls.__name__} does not define like.")

    @classmethod
    def from_dense(cls: type[Self], dense: nn.Module) -> Self:
        """Rounds the weight of a trained layer.

        Args:
            dense: the dense layer; it stays as it is.

        Raises:
            UnsupportedLayerError: if it is of another class, or an instance that does something of its own.
            LowRankError: for NaN, Inf, integer or meta weights.
        """
        strange = peculiarity(dense)
        if not cls.stands_for(dense) or strange is not None:
            got = type(dense).__name__ if strange is None else f"a {type(dense).__name__} that is changed: {strange}"
            without = " without max_norm" if issubclass(cls, nn.Embedding) else ""
            raise UnsupportedLayerError(f"{cls.__name__}.from_dense: got {got}, expected {cls.dense_name()}{without}.")
        weight = check_tensor(weight_of(dense), f"{cls.__name__}.from_dense")
        return cls.like(dense).fill_(weight, bias_of(dense))

    def to_dense(self) -> nn.Module:
        """Returns the torch layer that computes the same."""
        raise LowRankError(f"{type(self).__name__} does not define to_dense.")

    def dense_twin(self) -> nn.Module:
        """The dense layer on the meta device: the settings of :meth:`to_dense` without values."""
        return meta_twin(self).to_dense()

    def _adopted(self: Self, dense: nn.Module) -> Self:
        """Moves a new layer to the device of the dense one, and carries over its mode and instance attributes."""
        self.to_empty(device=weight_of(dense).device).train(dense.training)
        carry_attributes(self, dense)
        match_bias(self, dense)
        return self

    @torch.no_grad()
    def _returned(self, dense: nn.Module) -> nn.Module:
        """Gives a new dense layer the values, and carries mode and instance attributes back."""
        weight_of(dense).copy_(self.dequantized())
        bias, own = bias_of(dense), bias_of(self)
        if bias is not None and own is not None:
            bias.copy_(own)
        dense.train(self.training)
        return_attributes(dense, self)
        match_bias(dense, self)
        return dense
