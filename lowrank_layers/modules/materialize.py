"""Giving values to a model that was built on the meta device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import CheckpointError


def tied_names(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Returns the names of each tensor that has several, by the tensor's ``id``."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        names[id(tensor)].append(name)
    return {key: each for key, each in names.items() if len(each) > 1}


def check_can_be_filled(model: nn.Module, state: Mapping[str, Tensor], path: object) -> None:
    """Raises if a tensor on the meta device is not part of the state dict, so that no file can fill it."""
    empty = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        outside = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        for key, tensor in (*module._buffers.items(), *outside.items()):
            if tensor is not None and tensor.is_meta and f"{prefix}{key}" not in state:
                empty.append(f"{prefix}{key}")
    if empty:
        named = ", ".join(map(repr, empty[:5])) + (f", and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise CheckpointError(
            f"{path}: the model has tensors on the meta device that are not part of its state dict, so that no file"
            f" holds their values: {named}. Assign them before loading, or build the model where they get their values:"
            " without torch.device('meta'), or under accelerate.init_empty_weights(), which leaves buffers as they are."
            " The model is unchanged."
        )


def fill_(model: nn.Module, tensors: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Puts tensors in the place of parameters and buffers on the meta device, with the ties that they have.

    Names of one tensor in the model stay one, and those that were one in the saved model become one.

    Args:
        model: changed in place.
        tensors: the values by their names in the state dict.
        shared: the first name of every tensor of the saved model that had several, by its other names.
    """
    by_id: dict[int, Tensor] = {}
    by_name: dict[tuple[str, bool], Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                name = f"{prefix}.{key}" if prefix else key
                if tensor is None or name not in tensors:
                    continue
                learns = isinstance(tensor, nn.Parameter)
                first = shared.get(name, name), learns
                if tensor.is_meta:
                    new = by_id.get(id(tensor), by_name.get(first))
                    if new is None:
                        new = nn.Parameter(tensors[name], tensor.requires_grad) if learns else tensors[name]
                    by_id[id(tensor)] = own[key] = new
                by_name.setdefault(first, own[key])
