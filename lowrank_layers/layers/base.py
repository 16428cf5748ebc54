"""What all factored layers have in common: the contract, and the steps every conversion takes."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..factors import Factorization
from .computed_weight import computed

FACTORED_LAYERS: dict[str, type[FactoredModule]] = {}
"""Every factored layer by its class name: what a checkpoint may name."""

Self = TypeVar("Self", bound="FactoredModule")
Module = TypeVar("Module", bound=nn.Module)


class FactoredModule(nn.Module):
    """A layer whose weight is a product of smaller ones, held by its children in the order in which they run.

    A subclass gives ``dense_type``, ``like``, ``from_dense``, ``to_dense``, ``rank``, ``product`` and ``factors``;
    defining it registers it under its class name.
    """

    dense_type: ClassVar[type[nn.Module]]
    """The torch class that it stands in for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "dense_type" in cls.__dict__:
            FACTORED_LAYERS[cls.__name__] = cls

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether this is the dense layer that it replaces: the type itself, no subclass, whose forward may differ."""
        return type(module) is cls.dense_type

    @classmethod
    def dense_name(cls) -> str:
        """What users call the dense layer."""
        return f"nn.{cls.dense_type.__name__}"

    @property
    def rank(self) -> Any:
        """Size of the inner dimension (Tucker: of the output and input channels)."""
        raise LowRankError(f"{type(self).__name__} does not define rank.")

    @property
    def form(self) -> dict[str, Any]:
        """What besides the rank tells one such layer from another: keywords of the constructor and of ``like``."""
        return {}

    def product(self) -> Tensor:
        """The dense weight, multiplied out of the factors, differentiable."""
        raise LowRankError(f"{type(self).__name__} does not define product.")

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out on every access, differentiable, to be read only.

        For code that reads ``layer.weight`` instead of calling the layer: it gets the right answer at the dense price.
        What is written to it would be lost, and raises a :class:`LowRankError` that says where to write instead.
        """
        return computed(self.product().contiguous(), self._read_only())

    def _read_only(self) -> str:
        names = [name for name, child in self.named_children() if child in self.parts]
        factors = ", ".join(f"{name}.weight" for name in names)
        return (
            f"{type(self).__name__}: its weight is multiplied out of its factors on every access, so that what is"
            f" written to it would be lost; write to the factors ({factors}), fuse a batch norm into the last one"
            f" ({names[-1]}), make the layer dense first (to_dense(), or densify_ for a model), or take a copy with"
            " .detach().clone()."
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(type(self).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise LowRankError(self._read_only())
        if name == "bias" and "bias" in self.last._parameters:
            self.last.bias = value
        else:
            super().__setattr__(name, value)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which the last child holds."""
        return bias_of(self.last)

    @classmethod
    def like(cls: type[Self], dense: nn.Module, *, rank: Any, bias: bool | None = None) -> Self:
        """A layer with the settings, device and dtype of ``dense``, **uninitialized**.

        Args:
            dense: the layer to imitate.
            rank: an integer, or what the layer takes.
            bias: whether it has a bias; ``None`` does as ``dense`` does.
        """
        raise LowRankError(f"{cls.__name__} does not define like.")

    @classmethod
    def from_dense(cls: type[Self], dense: nn.Module, /, *, rank: Any) -> Self:
        """The best layer of this kind for the weight of ``dense``."""
        raise LowRankError(f"{cls.__name__} does not define from_dense.")

    def to_dense(self) -> nn.Module:
        """The torch layer that computes the same."""
        raise LowRankError(f"{type(self).__name__} does not define to_dense.")

    def factors(self) -> Factorization:
        """The weight as a factorization (detached, no copy of the storage is promised)."""
        raise LowRankError(f"{type(self).__name__} does not define factors.")

    def own_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates on one sample that happen between the children, not in them."""
        return 0

    def dense_twin(self) -> nn.Module:
        """:meth:`to_dense` without values, on the meta device: only the settings."""
        return meta_twin(self).to_dense()

    @property
    def parts(self) -> list[nn.Module]:
        """The children that hold the factors, in the order in which they run."""
        return [child for name, child in self.named_children() if not name.startswith("lora_")]

    @property
    def last(self) -> nn.Module:
        """The child that runs last and holds the bias."""
        return self.parts[-1]


def refuse_scripting(name: str) -> NoReturn:
    """Raises what ``torch.jit.script`` shows for a low-rank layer, whose code it cannot read."""
    raise LowRankError(
        f"torch.jit.script: the model has a {name}, which cannot be scripted; use torch.jit.trace or torch.export, or"
        " make a copy of the model dense first (densify_)."
    )


def is_factored(module: nn.Module) -> bool:
    """Whether ``module`` is one of this library's layers."""
    return isinstance(module, FactoredModule)


def is_derived(module: nn.Module) -> bool:
    """Whether a weight is no parameter but computed from some, by a parametrization or a hook."""
    if is_factored(module):
        return False
    if hasattr(module, "parametrizations"):
        return True
    return "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor)


def weight_of(module: nn.Module) -> Tensor:
    """``module.weight``, as the tensor that it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def bias_of(module: nn.Module) -> Tensor | None:
    """``module.bias``, or ``None`` where there is none."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def meta_twin(module: Module) -> Module:
    """The same layer and its children on the meta device, without values."""
    twin: Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        key: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for key, p in module._parameters.items()
    }
    twin._buffers = {key: None if b is None else b.to("meta") for key, b in module._buffers.items()}
    twin._modules = {key: None if child is None else meta_twin(child) for key, child in module._modules.items()}
    return twin


def adopt(new: Self, dense: nn.Module) -> Self:
    """Carries over what is not in the signature: train or eval mode, ``requires_grad``, attributes of the instance."""
    new.train(dense.training)
    carry_attributes(new, dense)
    new.requires_grad_(weight_of(dense).requires_grad)
    _match_bias(new.last, dense)
    return new


def adopt_dense(dense: nn.Module, factored: FactoredModule) -> None:
    """The way back of :func:`adopt`."""
    dense.train(factored.training)
    return_attributes(dense, factored)
    dense.requires_grad_(any(weight_of(child).requires_grad for child in factored.parts))
    _match_bias(dense, factored.last)


_CARRIED = "_carried_attributes"


def carry_attributes(new: nn.Module, dense: nn.Module) -> None:
    """Gives a new module the attributes that were set on the dense instance and that its class does not know."""
    known = own_attributes(type(dense))
    carried = {key: value for key, value in vars(dense).items() if key not in known and not hasattr(new, key)}
    new.__dict__.update(carried)
    new.__dict__[_CARRIED] = tuple(carried)


def return_attributes(dense: nn.Module, new: nn.Module) -> None:
    """Gives a dense module back what :func:`carry_attributes` took over."""
    for key in vars(new).get(_CARRIED, ()):
        dense.__dict__[key] = vars(new)[key]


_OWN: dict[type[nn.Module], frozenset[str]] = {}


def own_attributes(kind: type[nn.Module]) -> frozenset[str]:
    """What a new layer of that kind has in its ``__dict__``."""
    if kind not in _OWN:
        sizes = (1,) * (3 if issubclass(kind, nn.modules.conv._ConvNd) else 2)
        with torch.device("meta"):
            _OWN[kind] = frozenset(vars(kind(*sizes)))
    return _OWN[kind]


def _match_bias(new: nn.Module, old: nn.Module) -> None:
    bias, model = bias_of(new), bias_of(old)
    if bias is not None and model is not None:
        bias.requires_grad_(model.requires_grad)


@torch.no_grad()
def fill(layer: Self, weights: list[Tensor], bias: Tensor | None) -> Self:
    """Copies values into the children, in order; shapes are adapted, dtype and device are the layer's."""
    for child, weight in zip(layer.parts, weights, strict=True):
        parameter = weight_of(child)
        parameter.copy_(weight.reshape(parameter.shape))
    own = bias_of(layer.last)
    if own is not None:
        own.zero_() if bias is None else own.copy_(bias)
    return layer


@torch.no_grad()
def reset_chain(layer: FactoredModule, fan_in: int) -> None:
    """Gives a fresh layer the output variance of its dense twin.

    torch.nn draws a dense weight from ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, whose variance is ``1/(3 fan_in)``.
    Here every child but the last preserves the variance of its input, and the last one makes up what is left: an entry
    of the product sums over all inner indices, as many as the ranks multiply to.
    """
    inner = math.prod(layer.rank) if isinstance(layer.rank, tuple) else layer.rank
    left = 1 / (3 * max(1, fan_in) * inner)
    *others, last = layer.parts
    for child in others:
        fan = max(1, _fan_in(child))
        nn.init.uniform_(weight_of(child), -math.sqrt(3 / fan), math.sqrt(3 / fan))
        left *= fan
    nn.init.uniform_(weight_of(last), -math.sqrt(3 * left), math.sqrt(3 * left))
    bias = bias_of(last)
    if bias is not None:
        nn.init.uniform_(bias, -1 / math.sqrt(max(1, fan_in)), 1 / math.sqrt(max(1, fan_in)))


def _fan_in(child: nn.Module) -> int:
    """Inputs that meet in one output, all positions of a kernel counted."""
    weight = weight_of(child)
    if getattr(child, "transposed", False):
        return weight.numel() // weight.shape[1] // getattr(child, "groups", 1)
    return weight[0].numel()
