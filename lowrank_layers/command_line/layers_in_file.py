"""The layers that a checkpoint without a model class stands for, as far as names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..layers.config import Spec, blank
from ..linalg import check_tensor
from .checkpoint import Checkpoint, TensorInfo

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


def reasons_not_linear(owners: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, str]:
    """Returns why modules with a weight of two or more dimensions are not taken for linear layers, by name.

    Args:
        owners: what :func:`owners_of` returned.
    """
    transposed = any(_is_transposed(own) for own in owners.values())
    found = {}
    for owner, own in owners.items():
        weight = own.get("weight")
        if weight is None or len(weight.shape) < 2:
            continue
        parent = owner.rpartition(".")[0]
        square = weight.shape[0] == weight.shape[1]
        if len(weight.shape) > 2:
            found[owner] = "the stride, padding and groups of its kernel are not in the file"
        elif not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            found[owner] = f"its weight is {_name(weight.dtype)}"
        elif set(own) - {"weight", "bias"}:
            found[owner] = "it has more than a weight and a bias"
        elif is_embedding_name(owner):
            found[owner] = "it is an embedding, by its name"
        elif "in_proj_weight" in owners.get(parent, ()):
            found[owner] = "it is a part of an nn.MultiheadAttention"
        elif _is_transposed(own) or (transposed and square):
            found[owner] = "its weight is [in, out], as in transformers' Conv1D"
        elif "bias" in own and own["bias"].shape != weight.shape[:1]:
            found[owner] = "its bias does not belong to a linear layer"
    return found


def linear_names(owners: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Returns the names of the modules that are linear layers, in the order of the file.

    Args:
        owners: what :func:`owners_of` returned.
    """
    reasons = reasons_not_linear(owners)
    return [o for o, own in owners.items() if o not in reasons and "weight" in own and len(own["weight"].shape) == 2]


def is_embedding_name(owner: str) -> bool:
    """Returns whether a module is an embedding by its name: nothing else in a file tells it from a linear layer.

    Args:
        owner: name of the module.
    """
    return _EMBEDDING.search(owner) is not None


def linear_spec(infos: Mapping[str, TensorInfo], owner: str) -> Spec:
    """Returns the settings of a linear layer, as plans and files hold them.

    Args:
        infos: shapes and dtypes by full name.
        owner: name of the layer.
    """
    weight = infos[f"{owner}.weight"]
    rows, columns = weight.shape
    sizes = {"in_features": columns, "out_features": rows, "bias": f"{owner}.bias" in infos}
    return {"type": "Linear", **sizes, "dtype": _name(weight.dtype)}


def read_linear(checkpoint: Checkpoint, owner: str) -> nn.Linear:
    """Returns a linear layer with the values of the file.

    Args:
        checkpoint: where the values are.
        owner: name of the layer.

    Raises:
        LowRankError: if a value is not finite.
    """
    layer = blank(linear_spec(checkpoint, owner))
    assert isinstance(layer, nn.Linear)
    for key, _ in list(layer.named_parameters()):
        values = checkpoint.read(f"{owner}.{key}")
        setattr(layer, key, nn.Parameter(check_tensor(values, f"{checkpoint.path}: {owner}.{key}", ndim=values.ndim)))
    return layer.eval()


def forget_values_(layer: nn.Linear) -> None:
    """Lets go of the values of a layer, in place; shapes and dtypes stay.

    Args:
        layer: the layer.
    """
    for key, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, key, nn.Parameter(_empty(TensorInfo(tuple(parameter.shape), parameter.dtype))))


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
            place = place._modules.get(part) or _added(place, part, nn.Module())
        _added(place, last, modules[name])
    return root


def _added(parent: nn.Module, name: str, module: nn.Module) -> nn.Module:
    parent.add_module(name, module)
    return module


def skeleton(infos: Mapping[str, TensorInfo], embeddings: Collection[str] = ()) -> nn.Module:
    """Returns a model with all names, shapes and dtypes of a checkpoint, whose values take no memory.

    Linear layers, convolutions and embeddings are modules of these kinds; all else hangs in bare modules.

    Args:
        infos: shapes and dtypes by full name.
        embeddings: names of modules that are embeddings, whatever they are called.
    """
    owners = owners_of(infos)
    linear = set(linear_names(owners)) - set(embeddings)
    root = tree(
        {o: _module(own, o in linear, o in embeddings or is_embedding_name(o)) for o, own in owners.items() if o}
    )
    for key, info in owners.get("", {}).items():
        _register(root, key, _empty(info))
    return root


def set_values_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of those of a model, in place.

    Args:
        model: what :func:`skeleton` returned.
        tensors: values by full name.
    """
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        _register(model.get_submodule(owner), key, tensor)


def _module(own: Mapping[str, TensorInfo], linear: bool, embedding: bool) -> nn.Module:
    weight = own.get("weight")
    module = nn.Module()
    if weight is not None and not set(own) - {"weight", "bias"}:
        kind: Spec = {"bias": "bias" in own, "dtype": _name(weight.dtype)}
        if linear:
            module = blank(linear_spec({f"layer.{key}": info for key, info in own.items()}, "layer"))
        elif embedding and len(weight.shape) == 2:
            module = nn.Embedding(*weight.shape, device="meta", dtype=weight.dtype)
        elif 3 <= len(weight.shape) <= 5:
            rows, columns, *area = weight.shape
            kind |= {"in_channels": columns, "out_channels": rows, "kernel_size": area}
            module = blank({"type": f"Conv{len(area)}d", **kind})
    for key, info in own.items():
        _register(module, key, _empty(info))
    return module


def _register(module: nn.Module, key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point():
        module._parameters.pop(key, None)
        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
    else:
        module._buffers.pop(key, None)
        module.register_buffer(key, tensor)


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
