"""Keeping an optimizer in step with a model whose parameters were replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..layers import PROJECTIONS, FactoredModule, LowRankMultiheadAttention, bias_of, weight_of
from .factor_moments import factor_moments

FIRST_MOMENTS = ("exp_avg", "grad_avg", "momentum_buffer")
"""Keys of an optimizer's state that are means of gradients."""
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Keys that are means or sums of their squares."""
Convert = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Succession:
    """New parameters in the place of old ones.

    Args:
        old: the parameters that were, by their names in the module.
        new: those in their place; empty if nothing follows.
        convert: from tensors of the old parameters' shapes, such as their momentum, to those of the new ones; ``None``
            if none follow from them, so that the new ones start without.
        convert_squares: the same for squares of gradients, where they follow in another way; what is neither gradients
            nor squares is dropped then.
    """

    old: Mapping[str, nn.Parameter]
    new: Mapping[str, nn.Parameter]
    convert: Convert | None = None
    convert_squares: Convert | None = None


def check_optimizer(optimizer: object, owner: str) -> None:
    """Raises if ``optimizer`` is given and is none of torch's, or cannot be given other parameters."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise LowRankError(f"{owner}: got optimizer of type {type(optimizer).__name__}, expected a torch.optim one.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise LowRankError(
            f"{owner}: got LBFGS, whose state is that of all parameters together; leave optimizer out, and make a new"
            " one afterwards."
        )


def remap_optimizer_(optimizer: torch.optim.Optimizer, successions: Iterable[Succession]) -> None:
    """Puts new parameters in the groups of the old ones, with as much of the state (momentum...) as holds for them.

    Parameters that the optimizer does not have are left out, and so are those that succeed them.

    Args:
        optimizer: changed in place.
        successions: which parameters follow which; none is both old and new.
    """
    successions = list(successions)
    by_old = {id(parameter): each for each in successions for parameter in each.old.values()}
    placed: set[int] = set()
    for group in optimizer.param_groups:
        parameters: list[nn.Parameter] = []
        names: list[str] = []
        for k, parameter in enumerate(group["params"]):
            name = group["param_names"][k] if "param_names" in group else ""
            each = by_old.get(id(parameter))
            if each is None:
                parameters.append(parameter)
                names.append(name)
            elif id(each) not in placed:
                placed.add(id(each))
                key = next(key for key, old in each.old.items() if old is parameter)
                parameters += each.new.values()
                names += [f"{name.removesuffix(key)}{new_key}" for new_key in each.new]
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"] = names
    for each in successions:
        _carry_state_(optimizer, each)


def _carry_state_(optimizer: torch.optim.Optimizer, succession: Succession) -> None:
    """Moves the state of the old parameters to the new ones, or drops it where that is not possible."""
    states = [optimizer.state.pop(parameter, {}) for parameter in succession.old.values()]
    if succession.convert is None or not all(states) or any(state.keys() != states[0].keys() for state in states):
        return
    shapes = [parameter.shape for parameter in succession.old.values()]
    result: list[dict[str, object]] = [{} for _ in succession.new]
    for key, first in states[0].items():
        values = [state[key] for state in states]
        if all(isinstance(v, Tensor) and v.shape == shape for v, shape in zip(values, shapes, strict=True)):
            if (convert := _conversion(succession, key)) is None:
                return
            found = convert(values)
        elif isinstance(first, Tensor) and first.numel() == 1:  # the count of steps; each needs its own
            found = [first.clone() for _ in result]
        elif not isinstance(first, Tensor) or shapes == [parameter.shape for parameter in succession.new.values()]:
            found = [first] * len(result)
        else:
            return
        for state, value in zip(result, found, strict=True):
            state[key] = value
    optimizer.state.update(zip(succession.new.values(), result, strict=True))


def _conversion(succession: Succession, key: str) -> Convert | None:
    if succession.convert_squares is None or key in FIRST_MOMENTS:
        return succession.convert
    return succession.convert_squares if key in SECOND_MOMENTS else None


def successions(old: nn.Module, new: nn.Module) -> list[Succession]:
    """Returns which parameters of a module take the place of which of the module that it replaces.

    State is kept from a parameter to the one of the same name and shape, from the bias of a dense layer to that of a
    factored one and back, between the fused and the separate projections of an attention, and from two factors to two
    of another rank. Other factors start without; what both modules hold stays as it is.
    """
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    in_both = {id(parameter) for parameter in before.values()} & {id(parameter) for parameter in after.values()}
    before, after = ({k: p for k, p in side.items() if id(p) not in in_both} for side in (before, after))
    found = _factor_pairs(old, new, before, after)
    for old_keys, new_keys, convert in [*_attention_pairs(old, new), *_equal_pairs(before, after), *_biases(old, new)]:
        if all(key in before for key in old_keys) and all(key in after for key in new_keys):
            olds = {key: before.pop(key) for key in old_keys}
            found.append(Succession(olds, {key: after.pop(key) for key in new_keys}, convert))
    old_biases, old_weights = _biases_and_weights(before)
    new_biases, new_weights = _biases_and_weights(after)
    if not old_biases:  # a new bias where there was none
        new_biases, new_weights = {}, new_weights | new_biases
    return [*found, Succession(old_weights, new_weights), Succession(old_biases, new_biases)]


def _factor_pairs(
    old: nn.Module, new: nn.Module, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]
) -> list[Succession]:
    """The two factors of a layer and those of the layer of another rank in its place, taken out of both sides."""
    conversions = factor_moments(old, new)
    if conversions is None:
        return []
    sides = []
    for layer, parameters in ((old, before), (new, after)):
        assert isinstance(layer, FactoredModule)
        named = {id(parameter): name for name, parameter in parameters.items()}
        names = [named.get(id(weight_of(part))) for part in layer.parts]
        sides.append({name: parameters[name] for name in names if name is not None})
    if not len(sides[0]) == len(sides[1]) == 2:
        return []
    for side, parameters in zip(sides, (before, after), strict=True):
        for name in side:
            del parameters[name]
    return [Succession(sides[0], sides[1], *conversions)]


_Pair = tuple[Sequence[str], Sequence[str], Convert]


def _equal_pairs(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[_Pair]:
    names = [name for name, old in before.items() if name in after and after[name].shape == old.shape]
    return [([name], [name], _same) for name in names]


def _biases(old: nn.Module, new: nn.Module) -> list[_Pair]:
    """The biases of a dense and of a factored layer, which have different names."""
    biases = [bias_of(old), bias_of(new)]
    keys = [
        [name for name, parameter in module.named_parameters() if parameter is bias]
        for module, bias in zip((old, new), biases, strict=True)
    ]
    equal = biases[0] is not None and biases[1] is not None and biases[0].shape == biases[1].shape
    return [(keys[0], keys[1], _same)] if equal and all(keys) else []


def _attention_pairs(old: nn.Module, new: nn.Module) -> list[_Pair]:
    """The parameters of a closed attention, in one piece or in three, and those of an open one."""
    names = PROJECTIONS[:3]
    separate: list[tuple[list[str], list[str]]] = [([f"{name}_weight"], [f"{name}.weight"]) for name in names]
    fused = [([f"in_proj_{key}"], [f"{name}.{key}" for name in names]) for key in ("weight", "bias")]
    if isinstance(old, nn.MultiheadAttention) and isinstance(new, LowRankMultiheadAttention):
        split = [(joint, parts, _split) for joint, parts in fused]
        return [*split, *((closed, opened, _same) for closed, opened in separate)]
    if isinstance(old, LowRankMultiheadAttention) and isinstance(new, nn.MultiheadAttention):
        joined = [(parts, joint, _join) for joint, parts in fused]
        return [*joined, *((opened, closed, _same) for closed, opened in separate)]
    return []


def _same(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


def _split(tensors: list[Tensor]) -> list[Tensor]:
    return [part.clone() for part in tensors[0].chunk(3)]


def _join(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat(tensors)]


def _biases_and_weights(
    parameters: Mapping[str, nn.Parameter],
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    biases = {name: parameter for name, parameter in parameters.items() if name.endswith("bias")}
    return biases, {name: parameter for name, parameter in parameters.items() if name not in biases}
