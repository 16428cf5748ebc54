"""``swap_lora_``: the values of a file in an adapter that is there, without new modules or new shapes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..modules import check_model, named_tensors
from .adapted_weight import AdaptedWeight, adapted_weights
from .adapter import Adapter
from .adapter_file import AdapterFile, LoadedAdapter, refuse
from .attach import choose_name
from .load import read_adapter_file
from .mixed_groups import MixedGroups
from .module_copies import copied_tensors
from .trainable_tokens import TokenRows
from .weight_layout import WeightLayout


@torch.no_grad()
def swap_lora_(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """Replaces the values of an adapter by those of a file, in place: a compiled model is not compiled again.

    Parameters stay the same tensors of the same shapes. A smaller rank is filled up with zeros, and layers that the
    file has no adapter for get one that adds nothing, so that one adapter of the greatest rank on all layers can take
    the values of every other. Everything is read and compared before anything changes.

    Args:
        model: an adapted model, compiled or not.
        folder: folder or single file, of any format that :func:`load_lora` reads.
        name: name of the adapter whose values are replaced; may be left out where there is one only.
        rank: rank in a single file, where it is to be checked.
        alpha: numerator of the scale ``alpha / rank``, for a single file that has none.
        prefix: prefix of the keys that belong to this model, for a single file with adapters for several models.

    Returns:
        The model.

    Raises:
        CheckpointError: if the file is torn or foreign, has an adapter where the model has none, a greater rank, or
            trains something that the adapter has no place for; nothing changes then.
        LowRankError: for an unknown name, or if the adapter itself is merged; others may be.

    Examples:
        >>> import tempfile
        >>> folder, build = tempfile.mkdtemp(), lambda: nn.Sequential(nn.Linear(8, 6))
        >>> other = lr.add_lora_(build(), rank=2, init="gaussian")
        >>> _ = nn.init.ones_(other[0].lora_weight.adapters["default"].B)
        >>> lr.save_lora(other, folder)
        >>> model = lr.add_lora_(build(), rank=4)
        >>> _ = lr.swap_lora_(model, folder)
        >>> model[0].lora_weight.adapters["default"].B.sum(0).tolist()
        [6.0, 6.0, 0.0, 0.0]
    """
    inner = getattr(model, "_orig_mod", model)
    check_model(inner, quantized=True)
    name = choose_name(inner, name, "swap_lora_")
    own = adapted_weights(inner, name)
    merged = [weight.name for weight in own if weight.bank.merged is not None and weight.uses(name)]
    if merged:
        raise LowRankError(f"swap_lora_: the adapter {name!r} is merged into {merged[0]!r}; call unmerge_lora_ first.")
    path = Path(folder)
    file = read_adapter_file(inner, path, None, rank=rank, alpha=alpha, prefix=prefix)
    values = {loaded.weight: loaded for loaded in file.adapters}
    problems = [trouble for loaded in file.adapters if (trouble := _trouble(loaded, name))]
    problems += _trouble_beside(inner, name, file)
    problems += [trouble for weight, rows in file.tokens.items() if (trouble := _trouble_tokens(weight, rows, name))]
    if problems:
        refuse(path, problems)
    for weight in own:
        adapter = weight.adapter(name)
        assert adapter is not None
        if isinstance(adapter, TokenRows):
            adapter.rows.zero_()
        elif weight in values:
            _fill(adapter, values[weight])
        else:
            _empty(adapter, weight)
    for weight, rows in file.tokens.items():
        own_rows = weight.adapter(name)
        assert isinstance(own_rows, TokenRows)
        own_rows.rows.copy_(rows.rows)
    copies = copied_tensors(inner, name)
    for key, copied in file.copied.items():
        copies[copied].copy_(file.tensors[key])
    return model


def _trouble(loaded: LoadedAdapter, name: str) -> str | None:
    """Why the values do not fit the adapter that is there, in words."""
    weight = loaded.weight
    adapter, label = weight.adapter(name), weight.name
    if loaded.mixes_groups or isinstance(adapter, MixedGroups):
        return f"{label!r} is a convolution with an adapter that mixes its groups, whose values cannot be swapped"
    if adapter is None or isinstance(adapter, TokenRows):
        return f"it adapts {label!r}, where the model has no adapter {name!r}"
    room = sum(len(a) for a, _ in _rooms(adapter, weight.layout))
    rank = len(weight.layout.directions(loaded.a, loaded.b)[0])
    if rank > room:
        return f"its rank is {rank} for {label!r}, above the adapter's {room}; make that with the greatest rank of all"
    for what, ours, theirs in (("DoRA", adapter.magnitude, loaded.magnitude), ("a bias", adapter.bias, loaded.bias)):
        if theirs is not None and ours is None:
            return f"it has {what} for {label!r}, and the adapter {name!r} has none"
    if adapter.magnitude is not None and loaded.magnitude is None:
        return f"it has no DoRA for {label!r}, and the adapter {name!r} has"
    return None


def _trouble_tokens(weight: AdaptedWeight, rows: TokenRows, name: str) -> str | None:
    """Why the file's rows of an embedding do not fit those that are there, in words."""
    own = weight.adapter(name)
    if isinstance(own, TokenRows) and torch.equal(own.tokens, rows.tokens):
        return None
    there = own.tokens.tolist() if isinstance(own, TokenRows) else "none"
    return f"it trains the tokens {rows.tokens.tolist()} of {weight.owner!r}, and the adapter {name!r} has {there}"


def _trouble_beside(model: nn.Module, name: str, file: AdapterFile) -> list[str]:
    """What the file holds beside low-rank adapters that the model has no place for, and the other way round."""
    own, base = copied_tensors(model, name), named_tensors(model)
    problems = [f"it trains {place!r} of the base, which a swap must not change" for place in file.base.values()]
    problems += [
        f"it brings other values of {place!r}, which belongs to the base"
        for key, place in file.embeddings.items()
        if not torch.equal(base[place].detach().cpu(), file.tensors[key].to(base[place].dtype))
    ]
    places = set(file.copied.values())
    problems += [f"it has {place!r} whole, of which the adapter has no copy" for place in sorted(places - own.keys())]
    problems += [f"it lacks {place!r}, which the adapter trains whole" for place in sorted(own.keys() - places)]
    return problems


def _rooms(adapter: Adapter, layout: WeightLayout) -> list[tuple[Tensor, Tensor]]:
    """Factors that take directions: the trained ones, and those of the start, whose product is subtracted."""
    rooms = [layout.directions(adapter.A, adapter.B)]
    if adapter.a0 is not None and adapter.b0 is not None:
        rooms.append(layout.directions(adapter.a0, adapter.b0))
    return rooms


def _fill(adapter: Adapter, loaded: LoadedAdapter) -> None:
    """Writes the values of a file into an adapter, in place; what its rank leaves of the factors is zero."""
    layout = loaded.weight.layout
    a, b = layout.directions(loaded.a, loaded.b)
    for sign, (own_a, own_b) in zip((1, -1), _rooms(adapter, layout), strict=False):
        count = min(len(own_a), len(a))
        own_a.zero_()
        own_b.zero_()
        own_a[:count].copy_(a[:count])
        own_b[:count].copy_(sign * b[:count])
        a, b = a[count:], b[count:]
    adapter.scaling.fill_(loaded.scaling)
    if adapter.magnitude is not None and loaded.magnitude is not None:
        adapter.magnitude.copy_(loaded.magnitude)
    if adapter.bias is not None:
        adapter.bias.zero_() if loaded.bias is None else adapter.bias.copy_(loaded.bias)


def _empty(adapter: Adapter, weight: AdaptedWeight) -> None:
    """Makes an adapter of a weight add nothing."""
    for _, b in _rooms(adapter, weight.layout):
        b.zero_()
    if adapter.magnitude is not None:
        adapter.magnitude.copy_(weight.layout.lengths(weight.values.float()))
    if adapter.bias is not None:
        adapter.bias.zero_()
