"""Checks that an instance does what its class says, so that a layer of another class can replace it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import LowRankError, UnsupportedLayerError
from ..linalg import check_tensor
from .base import FACTORED_LAYERS, FactoredModule, is_derived, is_factored
from .conversion import own_attributes
from .weights import meta_twin, weight_of

_COMPILED = "_compiled_call_impl"  # set by ``module.compile()``


def check_dense(cls: type[FactoredModule], dense: nn.Module) -> Tensor:
    """Returns the detached weight of a dense layer, or raises if ``cls`` cannot replace it.

    Subclasses, and instances with a forward of their own, may compute something else and are refused.

    Raises:
        UnsupportedLayerError: if ``cls`` cannot replace the layer.
        LowRankError: for NaN, Inf, integer or meta weights.
    """
    who = f"{cls.__name__}.from_dense"
    if isinstance(getattr(dense, "weight", None), nn.parameter.UninitializedParameter):
        raise UnsupportedLayerError(f"{who}: the weight is not initialized yet; run one batch through the model.")
    if is_derived(dense):
        raise UnsupportedLayerError(
            f"{who}: the weight is parametrized: computed from others by weight norm, spectral norm, pruning...;"
            " fold it first with torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm,"
            " remove_spectral_norm or prune.remove."
        )
    if not cls.stands_for(dense):
        hint = " Factorize it once; to change its rank, use factors().truncate." if is_factored(dense) else ""
        raise UnsupportedLayerError(f"{who}: got {type(dense).__name__}, expected {cls.dense_name()} itself.{hint}")
    strange = peculiarity(dense)
    if strange is not None:
        raise UnsupportedLayerError(f"{who}: got a {type(dense).__name__} that cannot be converted: {strange}.")
    return check_tensor(weight_of(dense), who)


def peculiarity(module: nn.Module) -> str | None:
    """Describes what an instance does or holds that its class does not, or returns ``None``.

    Examples:
        >>> from lowrank_layers.layers.instance_checks import peculiarity
        >>> linear = nn.Linear(8, 8)
        >>> linear.forward = lambda x: 2 * x
        >>> peculiarity(linear)
        'its forward was replaced on this instance'
    """
    own = vars(module)
    if "_hf_hook" in own:
        return "it carries a hook of accelerate; call accelerate.hooks.remove_hook_from_submodules(model) first"
    for name, value in own.items():
        inherited = inspect.getattr_static(type(module), name, None)
        if name == _COMPILED and value is not None:
            return "it is compiled by itself; compile the model after factorizing it"
        if (callable(inherited) or hasattr(inherited, "__get__")) and not _is_bound(value, module, inherited):
            return f"its {name} was replaced on this instance"
        if inherited is None and getattr(value, "__self__", None) is module:
            return f"its method {name} was set on this instance"
    known = _HELD.get(type(module).__name__) if type(module).__module__.startswith("torch.nn") else None
    if known is None:
        return _unlike_fresh(module)
    if any(isinstance(getattr(module, key, None), Tensor) and key not in module._parameters for key in known):
        return "a weight of it is computed (parametrized or normed); fold it to factorize it"
    return next((_more(key, f"nn.{type(module).__name__}") for key in _held(module) if key not in known), None)


def _is_bound(value: Any, module: nn.Module, function: Any) -> bool:
    """Returns whether a value is the class's own method, as accelerate leaves it behind when it removes a hook."""
    return getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is function


def _unlike_fresh(module: nn.Module) -> str | None:
    """Describes how a layer that can be replaced differs from a new one with the same settings."""
    kind = next((cls for cls in FACTORED_LAYERS.values() if cls.stands_for(module)), None)
    if kind is None or "weight" not in module._parameters:
        return None
    name = kind.dense_name()
    try:
        fresh = kind.like(meta_twin(module), rank=1).dense_twin()
    except (LowRankError, ValueError, TypeError, RuntimeError):
        return None  # building the layer will raise, and say what is wrong with the settings
    for key in _held(module):
        if key not in fresh._parameters:
            return _more(key, name)
    shape, expected = tuple(weight_of(module).shape), tuple(weight_of(fresh).shape)
    if shape != expected:
        return f"its weight has shape {shape}, but its settings say {expected}"
    unread = {_PADDING} if getattr(module, "padding_mode", "zeros") == "zeros" else set()
    for key in own_attributes(type(module)) - _MODULE - unread:
        value, expected_value = vars(module).get(key), vars(fresh)[key]
        if value != expected_value:
            return f"its {key} is {value!r}, but a new {name} with its settings has {expected_value!r}"
    return None


def _held(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, buffers and children."""
    return [*module._parameters, *module._buffers, *module._modules]


def _more(key: str, kind: str) -> str:
    """Says that an instance holds something that its class does not."""
    return f"it holds {key!r}, which {kind} does not have"


_HELD = {
    "MultiheadAttention": {
        *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
        *("bias_k", "bias_v", "out_proj"),
    },
    "NonDynamicallyQuantizableLinear": {"weight", "bias"},  # the class of its out_proj
}
_MODULE = frozenset(vars(nn.Module()))
_PADDING = "_reversed_padding_repeated_twice"
