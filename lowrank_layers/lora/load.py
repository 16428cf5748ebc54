"""``load_lora``: adapters from files of PEFT, loralib, torchtune, diffusers, kohya and ComfyUI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import is_number
from ..errors import CheckpointError, LowRankError
from ..layers import is_derived
from ..modules import check_model, module_aliases, named_tensors
from .adapted_weight import AdaptedWeight
from .adapter import Adapter, adapter_dtype, check_dtype
from .adapter_file import AdapterFile, LoadedAdapter, read_tensors, refuse
from .attach import adapting, attach_, check_new_name
from .diffusers import FILE as DIFFUSERS_FILE, find_diffusion
from .diffusion_keys import is_diffusion_file
from .inject import DEFAULT
from .loralib import find_loralib
from .mixed_groups import MixedGroups
from .modules_to_save import attach_whole_, find_whole, plain_copy
from .peft.keys import CONFIG, EMBEDDING_MARK, TRAINED_MARK
from .peft.load import find_peft


def load_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = DEFAULT,
    trainable: bool = True,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    prefix: str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Reads an adapter from a file of PEFT, diffusers, kohya, ComfyUI, loralib or torchtune onto a model, in place.

    Everything is read and compared first: settings, names, shapes, values. If anything does not fit, or a setting is
    not supported, the error lists it and the model is as it was. Modules that the file holds whole
    (``modules_to_save``) become copies that belong to the adapter; biases and embeddings replace the base's values.

    Args:
        model: the plain base; a compressed one is fine too, where a layer still is one matrix.
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``), as
            :func:`save_lora` and PEFT write it; or a single file: of diffusers (``unet.``, ``transformer.``,
            ``text_encoder.``), kohya's scripts (``lora_unet_``, ``lora_te_``), ComfyUI (``diffusion_model.``), loralib
            or torchtune.
        name: name of the new adapter.
        trainable: whether it learns.
        rank: rank in a single file, where it is to be checked.
        alpha: numerator of the scale ``alpha / rank``, for a single file that has none. Files of loralib and torchtune
            need it; those for diffusion models are added as they are without it.
        prefix: prefix of the keys that belong to this model (``"unet"``, ``"lora_te2"``), for a single file with
            adapters for several models; may be left out where only those of one fit.
        dtype: dtype of the adapter, as in :func:`add_lora_`: ``None`` is fp32, whatever the file and the base have.

    Returns:
        The model.

    Raises:
        CheckpointError: if the files are torn, foreign, or for another model.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> build = lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        >>> lr.save_lora(lr.add_lora_(build(), rank=2), folder)
        >>> try:
        ...     lr.load_lora(nn.Sequential(nn.Linear(8, 6)), folder)
        ... except lr.CheckpointError as error:
        ...     print("'1', which the model has not" in str(error))
        True
        >>> model = lr.load_lora(build(), folder, name="french")
        >>> model[0].lora_weight.names
        ['french']
    """
    check_model(model, quantized=True)
    check_new_name(name, "load_lora")
    check_dtype(dtype, "load_lora")
    path = Path(folder)
    file = read_adapter_file(model, path, name, rank=rank, alpha=alpha, prefix=prefix)
    problems = [trouble for loaded in file.adapters if (trouble := _trouble(model, loaded, name))]
    own = named_tensors(model)
    problems += [f"{place!r} is on the meta device" for place in file.base.values() if own[place].is_meta]
    try:
        modules = find_whole(model, file.saved, name, "load_lora")
    except LowRankError as error:
        problems.append(str(error).removeprefix("load_lora: ").removesuffix("."))
    if problems:
        refuse(path, problems)
    made: dict[AdaptedWeight, Adapter] = {loaded.weight: _adapter(loaded, dtype) for loaded in file.adapters}
    copies = {owner: _copy(module, owner, file, dtype) for owner, module in modules.items()}
    with adapting(model):
        _write_base_(own, file, trainable)
        for weight, adapter in (made | file.tokens).items():
            attach_(weight, name, adapter.requires_grad_(trainable))
        for owner, module in modules.items():
            attach_whole_(module, name, copies[owner].requires_grad_(trainable))
    return model


def read_adapter_file(
    model: nn.Module,
    path: Path,
    name: str | None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    prefix: str | None = None,
) -> AdapterFile:
    """What a folder or file has for a model, whoever wrote it.

    Args:
        model: the model that the names belong to.
        path: path of the folder or file.
        name: the adapter's name in the model, which must be new; ``None`` where its values are swapped.
        rank: rank in a single file, where it is to be checked.
        alpha: numerator of the scale ``alpha / rank``, for a single file that has none.
        prefix: prefix of the keys that belong to this model, for a single file with adapters for several models.

    Raises:
        CheckpointError: if it is torn, foreign, or for another model.
    """
    if path.is_dir() and not (path / CONFIG).is_file() and (path / DIFFUSERS_FILE).is_file():
        path = path / DIFFUSERS_FILE
    if path.is_dir():
        if (rank, alpha, prefix) != (None, None, None):
            raise LowRankError(
                "load_lora: got rank, alpha or prefix beside a folder, whose settings have them; leave them out."
            )
        return find_peft(model, path, name)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or folder.")
    for what, number in (("rank", rank), ("alpha", alpha)):
        if number is not None and not is_number(number):
            raise CheckpointError(f"{path}: got {what} {number!r}, expected the number that it was trained with.")
    tensors = read_tensors(path)
    if is_diffusion_file(tensors):
        return find_diffusion(model, path, tensors, rank=rank, alpha=alpha, prefix=prefix)
    if prefix is not None:
        raise CheckpointError(f"{path}: got prefix={prefix!r}, and is no file of diffusers, kohya or ComfyUI.")
    return find_loralib(model, path, tensors, rank=rank, alpha=alpha)


def _trouble(model: nn.Module, loaded: LoadedAdapter, name: str) -> str | None:
    """Why an adapter cannot be put on its weight, in words."""
    weight, module = loaded.weight, loaded.weight.module
    owner, kind, base = weight.owner, type(module).__name__, weight.base
    if weight.adapter(name) is not None:
        return f"{owner!r} has an adapter {name!r} already"
    if weight.is_adapted and weight.bank.merged is not None:
        return f"{owner!r} has adapters that are merged"
    if is_derived(module) and not (weight.is_adapted or weight.is_factored):
        return f"{owner!r} is parametrized; fold it first"
    aliases = module_aliases(model)[module]
    if len(aliases) > 1:
        return f"{owner!r} has several names ({aliases}), of which PEFT adapts the first only"
    if base.is_meta or not base.is_floating_point():
        return f"{owner!r} is {base.dtype} on {base.device}, expected floating point with values"
    if weight.is_factored and (weight.is_read_whole or loaded.magnitude is not None):
        return f"{owner!r} is a {kind}, which never forms its weight; call densify_ first"
    if loaded.mixes_groups and (weight.is_read_whole or weight.is_factored):
        return (
            f"{owner!r} is a {kind}, and its adapter reads the channels of all groups, which only torch's own"
            " convolutions can be given"
        )
    if loaded.bias is not None and weight.is_read_whole:
        return f"{owner!r} is a {kind}, which can have no lora_bias"
    return None


def _adapter(loaded: LoadedAdapter, dtype: torch.dtype | None) -> Adapter:
    """A fresh adapter with the values of a file."""
    base = loaded.weight.base
    a, b, magnitude, bias = (
        None if t is None else t.to(base.device, adapter_dtype(base, dtype)).clone().contiguous()
        for t in (loaded.a, loaded.b, loaded.magnitude, loaded.bias)
    )
    assert a is not None
    assert b is not None
    # where a weight is read as a whole there is no input to drop out from; PEFT does not either
    dropout = 0.0 if loaded.weight.is_read_whole else loaded.dropout
    cls = MixedGroups if loaded.mixes_groups else Adapter
    return cls(a, b, scaling=loaded.scaling, dropout=dropout, magnitude=magnitude, bias=bias)


def _copy(module: nn.Module, owner: str, file: AdapterFile, dtype: torch.dtype | None) -> nn.Module:
    """The copy of a module that the file holds."""
    copy = plain_copy(module, dtype)
    own = named_tensors(copy)
    with torch.no_grad():
        for key, place in file.copied.items():
            if place.startswith(f"{owner}."):
                own[place.removeprefix(f"{owner}.")].copy_(file.tensors[key])
    return copy


@torch.no_grad()
def _write_base_(own: Mapping[str, Tensor], file: AdapterFile, trainable: bool) -> None:
    """Writes what the file has of the base into the model's tensors, in place, and marks it for the next file."""
    for key, place in file.base.items():
        own[place].copy_(file.tensors[key])
        if isinstance(own[place], nn.Parameter):
            own[place].requires_grad_(trainable)
            setattr(own[place], TRAINED_MARK, True)
    for key, place in file.embeddings.items():
        if not torch.equal(own[place].detach().cpu(), file.tensors[key].to(own[place].dtype)):
            own[place].copy_(file.tensors[key])
            setattr(own[place], EMBEDDING_MARK, True)
