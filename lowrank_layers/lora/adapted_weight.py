"""One weight of a model that has adapters or can get them: found once, then passed on as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from ..layers import FactoredModule, Int8Layer, is_compressed
from ..modules import is_quantized, walk_layers
from .adapter import Adapter, Bank
from .forward import fast_call
from .module_copies import Copies
from .weight_layout import SLICES, WeightLayout, dense_weight, is_lookup, layout_of, parameter_of

BANK = "lora_{}"
"""Name of the child module that holds the adapters of a parameter: ``fc.lora_weight.adapters.default.A``."""


@dataclass(frozen=True)
class AdaptedWeight:
    """One weight of a model: a parameter, a slice of a fused parameter, or the product of a factored layer.

    Two are equal if they are the same parameter of the same module, so that they serve as keys of a dictionary.

    Args:
        owner: name of the module in the model.
        parameter: name of the parameter in the module; of a slice of ``in_proj_weight``, the name of the slice.
        module: the module itself.
    """

    owner: str
    parameter: str
    module: nn.Module = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the weight in the model."""
        return f"{self.owner}.{self.parameter}" if self.owner else self.parameter

    @property
    def base(self) -> Tensor:
        """The weight without its adapters, also while they are merged; of a factored layer, its product."""
        bank = bank_of(self.module, self.parameter)
        merged = None if bank is None else bank.merged
        return base_weight(self.module, self.parameter) if merged is None else merged

    @property
    def values(self) -> Tensor:
        """:attr:`base` as an ordinary tensor outside autograd; a quantized weight is dequantized."""
        return values_of(self.base).detach()

    @property
    def dense(self) -> Tensor | None:
        """The parameter, or the slice of it; ``None`` for a factored layer, which stores no such tensor."""
        return dense_weight(self.module, self.parameter)

    @cached_property
    def layout(self) -> WeightLayout:
        """How ``B A`` lies in the weight."""
        return self.bank.layout if self.is_adapted else layout_of(self.module, self.parameter)

    @property
    def is_slice(self) -> bool:
        """Whether the weight is one of the three slices of a fused ``in_proj_weight``."""
        return self.parameter in SLICES and parameter_of(self.module, "in_proj_weight") is not None

    @property
    def is_lookup(self) -> bool:
        """Whether rows of the weight are looked up, as in an embedding."""
        return is_lookup(self.module)

    @property
    def is_factored(self) -> bool:
        """Whether the weight is the product of a factored layer, or of codes in int8 and their scales."""
        return is_compressed(self.module)

    @property
    def is_read_whole(self) -> bool:
        """Whether the weight is read as a tensor, so that there is no input to drop out from and no output to add to.

        That holds for attentions, recurrent layers and layers with a method that was replaced on the instance.
        """
        return fast_call(self.module) is None

    @property
    def holder(self) -> nn.Parameter | None:
        """The parameter that stores the weight; for a slice, the fused one. ``None`` for a factored layer."""
        return self.module._parameters.get(self.holder_name)

    @property
    def holder_name(self) -> str:
        """Name of :attr:`holder` in the module."""
        return "in_proj_weight" if self.is_slice else self.parameter

    def slice_of(self, fused: Tensor) -> Tensor:
        """The view of a tensor like :attr:`holder` that belongs to this weight."""
        return fused.chunk(3)[SLICES.index(self.parameter)] if self.is_slice else fused

    @property
    def is_adapted(self) -> bool:
        """Whether the weight has adapters."""
        return bank_of(self.module, self.parameter) is not None

    @property
    def bank(self) -> Bank:
        """The adapters of the weight, which must have some."""
        bank = bank_of(self.module, self.parameter)
        assert bank is not None
        return bank

    def adapter(self, name: str | None) -> Adapter | None:
        """The adapter of that name, or ``None``."""
        bank = bank_of(self.module, self.parameter)
        own = None if bank is None or name is None else bank.adapters._modules.get(name)
        return own if isinstance(own, Adapter) else None

    def uses(self, name: str) -> bool:
        """Whether the weight has an adapter of that name which is in use."""
        adapter = self.adapter(name)
        return adapter is not None and adapter.in_use


def adapted_weights(model: nn.Module, name: str | None = None) -> list[AdaptedWeight]:
    """Every weight of a model that has adapters, or that has the adapter of one name."""
    found = [
        AdaptedWeight(owner, parameter, module)
        for owner, module in model.named_modules()
        for parameter in banks_of(module)
    ]
    return found if name is None else [weight for weight in found if name in weight.bank.adapters]


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its first name: no adapters, no copies of modules, no parts of factored layers."""
    found: dict[str, nn.Module] = {}
    inside: str | None = None  # what comes right after adapters or copies is their inside
    for name, module in walk_layers(model):
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, (Bank, Copies)) else None
        if inside is None:
            found[name] = module
    return found


def bank_of(module: nn.Module, name: str) -> Bank | None:
    """The adapters of one parameter, or ``None``."""
    bank = module._modules.get(BANK.format(name))
    return bank if isinstance(bank, Bank) else None


def banks_of(module: nn.Module) -> dict[str, Bank]:
    """The adapters of all parameters of a module, by the parameter's name."""
    names = getattr(module, "_adapted_names", ())
    return {name: bank for name in names if (bank := bank_of(module, name)) is not None}


def base_weight(module: nn.Module, name: str) -> Tensor:
    """The parameter without its adapters; of a factored layer, its product, and of one in int8, its values.

    Raises:
        AttributeError: if there is no such parameter.
    """
    weight = dense_weight(module, name)
    if weight is not None:
        return weight
    if isinstance(module, FactoredModule):
        return module.product()
    if isinstance(module, Int8Layer):
        return module.dequantized()
    raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")


def values_of(weight: Tensor) -> Tensor:
    """The weight as an ordinary tensor: a quantized one is dequantized."""
    return weight.dequantize() if is_quantized(weight) else weight
