"""The layers that a checkpoint without a model class stands for, as far as names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..files import TensorInfo
from ..layers.config import Spec, blank
from ..linalg import check_tensor

_EMBEDDING = re.compile(r"(^|\.)(\w*emb\w*|wte|wpe|shared)$", re.IGNORECASE)


def owners_of(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Returns the tensors of each module by their names there, by the name of the module.

    Args:
        infos: shapes and dtypes by full name.
    """
    owners: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        owner, _, key = name.rpartition(".")
        owners.setdefault(owner, {})[key] = info
    return owners


def linear_layers(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, Spec], dict[str, str]]:
    """Finds the linear layers among the modules of a checkpoint.

    A weight is taken for ``[in, out]``, as in transformers' Conv1D, if the length of its bias says so, or if it is
    square and others in the file are.

    Args:
        infos: shapes and dtypes by full name.

    Returns:
        The settings of each linear layer, as plans and files hold them, and for each other module with a weight of two
        or more dimensions the reason why it is not taken for one, both by name.
    """
    owners = owners_of(infos)
    transposed = any(_is_transposed(own) for own in owners.values())
    specs: dict[str, Spec] = {}
    reasons = {}
    for owner, own in owners.items():
        weight, bias = own.get("weight"), own.get("bias")
        if weight is None or len(weight.shape) < 2:
            continue
        rows, columns = weight.shape[:2]
        is_conv1d = _is_transposed(own) or (transposed and rows == columns and bias is not None)
        if len(weight.shape) > 2:
            reasons[owner] = "the stride, padding and groups of its kernel are not in the file"
        elif not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            reasons[owner] = f"its weight is {_name(weight.dtype)}"
        elif set(own) - {"weight", "bias"}:
            reasons[owner] = "it has more than a weight and a bias"
        elif is_embedding_name(owner):
            reasons[owner] = "it is an embedding, by its name"
        elif "in_proj_weight" in owners.get(owner.rpartition(".")[0], ()):
            reasons[owner] = "it is a part of an nn.MultiheadAttention"
        elif is_conv1d:
            specs[owner] = {"type": "Conv1D", "nf": columns, "nx": rows, "dtype": _name(weight.dtype)}
        elif bias is not None and bias.shape != (rows,):
            reasons[owner] = "its bias does not belong to a linear layer"
        else:
            sizes = {"in_features": columns, "out_features": rows, "bias": bias is not None}
            specs[owner] = {"type": "Linear", **sizes, "dtype": _name(weight.dtype)}
    return specs, reasons


def is_embedding_name(owner: str) -> bool:
    """Returns whether a module is an embedding by its name: nothing else in a file tells it from a linear layer.

    Args:
        owner: name of the module.
    """
    return _EMBEDDING.search(owner) is not None


def read_linear(checkpoint: Checkpoint, owner: str, spec: Spec) -> nn.Module:
    """Returns a linear layer with the values of the file.

    Args:
        checkpoint: where the values are.
        owner: name of the layer.
        spec: its settings.

    Raises:
        LowRankError: if a value is not finite.
    """
    layer = blank(spec)
    for key, _ in list(layer.named_parameters()):
        values = checkpoint.read(f"{owner}.{key}")
        _put_(layer, key, check_tensor(values, f"{checkpoint.path}: {owner}.{key}", ndim=values.ndim))
    return layer.eval()


def forget_values_(layer: nn.Module) -> None:
    """Lets go of the values of a layer, in place; shapes and dtypes stay.

    Args:
        layer: the layer.
    """
    for key, parameter in list(layer.named_parameters()):
        _put_(layer, key, _empty(TensorInfo(tuple(parameter.shape), parameter.dtype)))


def tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Returns a model that has these modules under these names.

    Args:
        modules: modules by name.
    """
    root = nn.Module()
    for name in sorted(modules, key=lambda name: name.count(".")):  # parents first
        place = root
        *parents, last = name.split(".")
        for part in parents:
            place = place._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        place._modules[last] = modules[name]
    return root


def skeleton(infos: Mapping[str, TensorInfo], embeddings: Collection[str] = ()) -> nn.Module:
    """Returns a model with all names, shapes and dtypes of a checkpoint, whose values take no memory.

    Linear layers, convolutions and embeddings are modules of these kinds; all else hangs in bare modules.

    Args:
        infos: shapes and dtypes by full name.
        embeddings: names of modules that are embeddings, whatever they are called.
    """
    specs, _ = linear_layers(infos)
    owners = owners_of(infos)
    root = tree({owner: _module(owner, own, specs, embeddings) for owner, own in owners.items() if owner})
    for key, info in owners.get("", {}).items():
        _put_(root, key, _empty(info))
    return root


def set_values_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of those of a model, in place.

    Args:
        model: what :func:`skeleton` returned.
        tensors: values by full name.
    """
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        _put_(model.get_submodule(owner), key, tensor)


def _module(
    owner: str, own: Mapping[str, TensorInfo], specs: Mapping[str, Spec], embeddings: Collection[str]
) -> nn.Module:
    weight = own.get("weight")
    module = nn.Module()
    if weight is not None and not set(own) - {"weight", "bias"}:
        if len(weight.shape) == 2 and (owner in embeddings or is_embedding_name(owner)):
            module = nn.Embedding(*weight.shape, device="meta", dtype=weight.dtype)
        elif owner in specs:
            module = blank(specs[owner])
        elif 3 <= len(weight.shape) <= 5:
            rows, columns, *area = weight.shape
            sizes = {"in_channels": columns, "out_channels": rows, "kernel_size": area, "bias": "bias" in own}
            module = blank({"type": f"Conv{len(area)}d", **sizes, "dtype": _name(weight.dtype)})
    for key, info in own.items():
        _put_(module, key, _empty(info))
    return module


def _put_(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Makes the tensor a parameter of the module, or a buffer if it holds integers; any name may be used."""
    module._parameters.pop(key, None)
    if tensor.is_floating_point():
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor


def _empty(info: TensorInfo) -> Tensor:
    """Zeros that are all one number in memory."""
    return torch.zeros((), dtype=info.dtype).expand(info.shape)


def _is_transposed(own: Mapping[str, TensorInfo]) -> bool:
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or bias is None or len(weight.shape) != 2 or weight.shape[0] == weight.shape[1]:
        return False
    return bias.shape == weight.shape[1:]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
