"""The steps that every conversion between a dense and a factored layer takes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from .base import FactoredModule
from .resized import RESIZED
from .weights import bias_of, weight_of

Self = TypeVar("Self", bound="FactoredModule")


def adopt(new: Self, dense: nn.Module) -> Self:
    """Carries the mode, ``requires_grad`` and instance attributes of a dense layer over to a factored one."""
    new.train(dense.training)
    carry_attributes(new, dense)
    new.requires_grad_(weight_of(dense).requires_grad)
    match_bias(new.last, dense)
    return new


def adopt_dense(dense: nn.Module, factored: FactoredModule) -> None:
    """Inverse of :func:`adopt`: carries them over from a factored layer to a dense one."""
    dense.train(factored.training)
    return_attributes(dense, factored)
    # a factor that is no parameter (int8) was never frozen by anybody
    weights = [child._parameters.get("weight") for child in factored.parts]
    dense.requires_grad_(any(weight is None or weight.requires_grad for weight in weights))
    match_bias(dense, factored.last)


_CARRIED = "_carried_attributes"


def carry_attributes(new: nn.Module, dense: nn.Module) -> None:
    """Copies attributes that were set on a dense instance, and that its class does not have, to a new module."""
    known = own_attributes(type(dense))
    carried = {key: value for key, value in vars(dense).items() if key not in known and not hasattr(new, key)}
    new.__dict__.update(carried)
    new.__dict__[_CARRIED] = tuple(carried)


def return_attributes(dense: nn.Module, new: nn.Module) -> None:
    """Copies the attributes that :func:`carry_attributes` took over back to a dense module."""
    for key in {*vars(new).get(_CARRIED, ()), RESIZED} & set(vars(new)):
        dense.__dict__[key] = vars(new)[key]


_OWN: dict[type[nn.Module], frozenset[str]] = {}


def own_attributes(kind: type[nn.Module]) -> frozenset[str]:
    """Names in the ``__dict__`` of a newly built layer of that class."""
    if kind not in _OWN:
        sizes = (1,) * (3 if issubclass(kind, nn.modules.conv._ConvNd) else 2)
        with torch.device("meta"):
            _OWN[kind] = frozenset(vars(kind(*sizes)))
    return _OWN[kind]


def match_bias(new: nn.Module, old: nn.Module) -> None:
    """Copies ``requires_grad`` of the bias, where both have one."""
    bias, model = bias_of(new), bias_of(old)
    if bias is not None and model is not None:
        bias.requires_grad_(model.requires_grad)


@torch.no_grad()
def fill(layer: Self, weights: list[Tensor], bias: Tensor | None) -> Self:
    """Copies values into the children, in the order they run.

    Args:
        layer: the factored layer; its dtype and device are kept.
        weights: one tensor per child, reshaped to the shape of the child's weight.
        bias: bias of the layer; ``None`` sets it to zero where there is one.
    """
    for child, weight in zip(layer.parts, weights, strict=True):
        parameter = weight_of(child)
        parameter.copy_(weight.reshape(parameter.shape))
    own = bias_of(layer.last)
    if own is not None:
        own.zero_() if bias is None else own.copy_(bias)
    return layer
