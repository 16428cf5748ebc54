"""The contract of all factored layers."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, TypeVar

from torch import Tensor, nn

from ..errors import LowRankError
from ..factors import Factorization
from .computed_weight import computed
from .weights import bias_of, meta_twin

FACTORED_LAYERS: dict[str, type[FactoredModule]] = {}
"""All factored layers by class name, for checkpoints."""

Self = TypeVar("Self", bound="FactoredModule")


class FactoredModule(nn.Module):
    """Base class of layers whose weight is a product of smaller ones, held by child modules in the order they run.

    A subclass defines ``dense_type``, ``like``, ``from_dense``, ``to_dense``, ``rank``, ``product`` and ``factors``;
    defining it registers it under its class name.
    """

    dense_type: ClassVar[type[nn.Module]]
    """The torch class that this layer replaces."""

    fuses_batch_norm: ClassVar[bool] = True
    """Whether the last child has a row for each output, so that a batch norm can be fused into it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "dense_type" in cls.__dict__:
            FACTORED_LAYERS[cls.__name__] = cls

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Returns whether this layer replaces ``module``: an instance of ``dense_type``, not of a subclass."""
        return type(module) is cls.dense_type

    @classmethod
    def dense_name(cls) -> str:
        """Name of the dense layer for messages."""
        return f"nn.{cls.dense_type.__name__}"

    @property
    def rank(self) -> Any:
        """Size of the inner dimension; for Tucker layers those of the output and the input channels."""
        raise LowRankError(f"{type(self).__name__} does not define rank.")

    @property
    def form(self) -> dict[str, Any]:
        """Keywords of the constructor, besides torch's own and the rank, that this layer was built with."""
        return {}

    def product(self) -> Tensor:
        """Multiplies out the dense weight, differentiably."""
        raise LowRankError(f"{type(self).__name__} does not define product.")

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out on every access, differentiable and read-only.

        Code that reads ``layer.weight`` instead of calling the layer gets the right values at the dense layer's cost.
        Writing to it raises a :class:`LowRankError` that says where to write instead.
        """
        return computed(self.product().contiguous(), self._read_only())

    def _read_only(self) -> str:
        """The error message for writes to ``weight``."""
        names = [name for name, child in self.named_children() if child in self.parts]
        factors = ", ".join(f"{name}.weight" for name in names)
        fuse = f" fuse a batch norm into the last one ({names[-1]})," if self.fuses_batch_norm else ""
        return (
            f"{type(self).__name__}: its weight is multiplied out of its factors on every access, so that what is"
            f" written to it would be lost; write to the factors ({factors}),{fuse} make the layer"
            " dense first (to_dense(), or densify_ for a model), or take a copy with .detach().clone()."
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
        """Bias of the layer, held by the last child."""
        return bias_of(self.last)

    @classmethod
    def like(cls: type[Self], dense: nn.Module, *, rank: Any, bias: bool | None = None) -> Self:
        """Builds an **uninitialized** layer with the settings, device and dtype of ``dense``.

        Args:
            dense: the layer to imitate.
            rank: an integer, or what the constructor takes.
            bias: whether the layer has a bias; by default it has one if ``dense`` does.
        """
        raise LowRankError(f"{cls.__name__} does not define like.")

    @classmethod
    def from_dense(cls: type[Self], dense: nn.Module, /, *, rank: Any) -> Self:
        """Factorizes a trained dense layer.

        Args:
            dense: the dense layer; it stays as it is.
            rank: the rank, in the form that the class takes.
        """
        raise LowRankError(f"{cls.__name__} does not define from_dense.")

    def to_dense(self) -> nn.Module:
        """Multiplies the factors out into the torch layer that computes the same."""
        raise LowRankError(f"{type(self).__name__} does not define to_dense.")

    def factors(self) -> Factorization:
        """The weight as a factorization, detached; it may share memory with the layer."""
        raise LowRankError(f"{type(self).__name__} does not define factors.")

    def own_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates per sample that happen between the children, not in them."""
        return 0

    def own_writes(self, input_shape: tuple[int, ...]) -> int:
        """Values written per sample besides the outputs that the children are built with."""
        return 0

    def dense_twin(self) -> nn.Module:
        """The dense layer on the meta device: the settings of :meth:`to_dense` without values."""
        return meta_twin(self).to_dense()

    @property
    def parts(self) -> list[nn.Module]:
        """The children that hold the factors, in the order they run."""
        return [child for name, child in self.named_children() if not name.startswith("lora_")]

    @property
    def last(self) -> nn.Module:
        """The child that runs last and holds the bias."""
        return self.parts[-1]


def refuse_scripting(name: str) -> NoReturn:
    """Raises the error that ``torch.jit.script`` shows for a low-rank layer, whose code it cannot compile."""
    raise LowRankError(
        f"torch.jit.script: the model has a {name}, which cannot be scripted; use torch.jit.trace or torch.export, or"
        " make a copy of the model dense first (densify_)."
    )


def is_factored(module: nn.Module) -> bool:
    """Returns whether a module is one of this library's factored layers."""
    return isinstance(module, FactoredModule)


def is_derived(module: nn.Module) -> bool:
    """Returns whether the weight is not a parameter but computed from others by a parametrization or a hook."""
    if is_factored(module):
        return False
    if hasattr(module, "parametrizations"):
        return True
    return "weight" not in module._parameters and isinstance(getattr(module, "weight", None), Tensor)
