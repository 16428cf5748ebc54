"""Reading the adapters that PEFT, loralib and torchtune wrote."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, LowRankError
from ...layers import is_derived, is_factored
from ...modules import check_model, module_aliases, update_shortcuts_
from ..adapted_weight import AdaptedWeight, bank_of
from ..adapter import Adapter, adapter_dtype, check_dtype
from ..attach import attach_, freeze_
from ..diffusers import FILE as DIFFUSERS_FILE, find_diffusion, is_diffusion_file
from ..forward import fast_call
from ..inject import DEFAULT
from ..mixed_groups import MixedGroups, dora_ratio
from ..tokens import TokenRows, base_rows, find_tokens
from ..weight_layout import Kernel
from ..whole import attach_whole_, find_whole, plain_copy
from .config import Config, config_of
from .keys import (
    CONFIG,
    EMBEDDING,
    OLD_WEIGHTS,
    PREFIX,
    TOKENS,
    WEIGHTS,
    WHOLE,
    embedding_keys,
    find_slots,
    own_tensors,
    saved_modules,
    token_key,
    whole_keys,
)
from .read import Read, Whole, differences, find_plain, read_json, read_tensors, refuse, without_adapter_name


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
    """Puts the adapter that :func:`save_lora`, PEFT, diffusers, kohya's scripts or ComfyUI wrote on a model, in place.

    Everything is read and compared first: settings, names, shapes, values. If anything does not fit, or a setting
    cannot be honoured, the error lists it and the model is as it was. Modules that the file holds whole
    (``modules_to_save``) become copies that belong to the adapter; biases and embeddings replace the base's values.

    Args:
        model: the plain base; a compressed one is fine too, where a layer still is one matrix.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``); or a single file, of
            diffusers (``unet.``, ``transformer.``, ``text_encoder.``), of kohya's scripts (``lora_unet_``,
            ``lora_te_``), of ComfyUI (``diffusion_model.``), of loralib or of torchtune.
        name: of the new adapter.
        trainable: whether it learns.
        rank: of a single file, where it is to be checked.
        alpha: of a single file that has none: the product is scaled by ``alpha / rank``. Files of loralib and torchtune
            need it; those for diffusion models are added as they are without it.
        prefix: of a single file with adapters for several models (``"unet"``, ``"lora_te2"``): which of them belong to
            this one; may be left out where only those of one fit.
        dtype: of the adapter, as in :func:`add_lora_`: ``None`` is fp32, whatever the file and the base have.

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
    if "." in name or not name:
        raise LowRankError(f"load_lora: got name {name!r}, expected one without dots.")
    check_dtype(dtype, "load_lora")
    path = Path(folder)
    found, whole, tensors = find_adapters(model, path, name, rank, alpha, prefix)
    problems = [trouble for read in found if (trouble := _trouble(model, read, name))]
    own = own_tensors(model)
    problems += [f"{place!r} is on the meta device" for place in whole.base.values() if own[place].is_meta]
    try:
        modules = find_whole(model, whole.saved, name, "load_lora")
    except LowRankError as error:
        problems.append(str(error).removeprefix("load_lora: ").removesuffix("."))
    if problems:
        refuse(path, problems)
    made = [(read.slot, _adapter(read, dtype)) for read in found]
    copies = {owner: _copy(module, owner, whole.copied, tensors, dtype) for owner, module in modules.items()}
    freeze_(model)
    with torch.no_grad():
        for key, place in whole.base.items():
            own[place].copy_(tensors[key])
            if isinstance(own[place], nn.Parameter):
                own[place].requires_grad_(trainable)
                setattr(own[place], WHOLE, True)
        for key, place in whole.embeddings.items():
            if not torch.equal(own[place].detach().cpu(), tensors[key].to(own[place].dtype)):
                own[place].copy_(tensors[key])
                setattr(own[place], EMBEDDING, True)
    for slot, adapter in made:
        weight = AdaptedWeight(slot.owner, slot.parameter, slot.module)
        attach_(weight, name, adapter.requires_grad_(trainable))
    for weight, rows in whole.tokens.items():
        attach_(weight, name, rows.requires_grad_(trainable))
    for owner, module in modules.items():
        attach_whole_(module, name, copies[owner].requires_grad_(trainable))
    update_shortcuts_(model)
    return model


def find_adapters(
    model: nn.Module,
    path: Path,
    name: str | None,
    rank: int | None = None,
    alpha: float | None = None,
    prefix: str | None = None,
) -> tuple[list[Read], Whole, dict[str, Tensor]]:
    """What a folder or file has for a model, whoever wrote it: adapters, what is held whole, and the tensors.

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
        return _find_peft(model, path, name)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or folder.")
    for what, number in (("rank", rank), ("alpha", alpha)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise CheckpointError(f"{path}: got {what} {number!r}, expected the number that it was trained with.")
    tensors = read_tensors(path)
    if is_diffusion_file(tensors):
        return find_diffusion(model, path, tensors, rank=rank, alpha=alpha, prefix=prefix)
    if prefix is not None:
        raise CheckpointError(f"{path}: got prefix={prefix!r}, and is no file of diffusers, kohya or ComfyUI.")
    return find_plain(model, path, tensors, rank, alpha)


def _find_peft(model: nn.Module, path: Path, name: str | None) -> tuple[list[Read], Whole, dict[str, Tensor]]:
    config, problems = config_of(read_json(path / CONFIG))
    if problems:
        refuse(path / CONFIG, problems)
    file = path / WEIGHTS
    if not file.is_file():
        file = path / OLD_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{path}: has neither {WEIGHTS} nor {OLD_WEIGHTS}.")
    tensors = without_adapter_name(file, read_tensors(file))
    slots, wraps, problems = find_slots(model, config)
    parts = ["a", "b"] + ["magnitude"] * config.use_dora + ["bias"] * config.lora_bias
    expected: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        rank, groups = config.rank(slot.label), slot.kind.groups if isinstance(slot.kind, Kernel) else 1
        if rank % groups:
            problems.append(f"{slot.owner!r} has {groups} groups, which do not divide its rank {rank}")
        shapes = slot.shapes(rank)
        expected |= {slot.keys[part]: shapes[part] for part in parts}
    own = own_tensors(model)
    saved = saved_modules(model, config.modules_to_save or ())
    copied = whole_keys(model, "none", saved, wraps)
    biases = {k: place for k, place in whole_keys(model, config.bias, saved, wraps).items() if k not in copied}
    frozen = {k: place for k, place in embedding_keys(model, wraps).items() if k in tensors and k not in copied}
    expected |= {key: tuple(own[place].shape) for key, place in (copied | biases | frozen).items()}
    tokens, keys, trouble = _find_tokens(model, config, tensors, name, {*wraps, *saved})
    expected |= keys
    problems += trouble + differences(tensors, expected)
    found = []
    for slot in [] if problems else slots:
        given = {part: tensors[slot.keys[part]] for part in parts}
        pair, scaling = slot.decode(given["a"], given["b"]), config.scaling(slot.label)
        magnitude = given["magnitude"].flatten() if "magnitude" in given else None
        kind, weight = slot.kind, slot.weight
        if magnitude is not None and isinstance(kind, Kernel) and kind.groups > 1 and not weight.is_meta:
            magnitude = magnitude * dora_ratio(weight, given["a"], given["b"], scaling, kind.groups).cpu()
        bias = given["bias"] * scaling if "bias" in given else None
        a, b = pair or (given["a"], given["b"])
        found.append(Read(slot, a, b, scaling, config.lora_dropout, magnitude, bias, mixed=pair is None))
    if problems:
        refuse(path, problems)
    fill_tokens(tokens, tensors)
    return found, Whole(biases, saved, copied, frozen, tokens), tensors


def _find_tokens(
    model: nn.Module, config: Config, tensors: Mapping[str, Tensor], name: str | None, taken: Iterable[str]
) -> tuple[dict[AdaptedWeight, TokenRows], dict[str, tuple[int, ...]], list[str]]:
    """The rows that are trained on their own, the shapes of what the file must have of them, and what is wrong."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}, {}, []
    ties = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if isinstance(wanted, dict) and ties:
        # PEFT writes what tied layers share once
        first = {str(indices): key for key, indices in reversed(wanted.items())}
        ends = tuple(key.removeprefix(PREFIX).removesuffix(TOKENS) for key in tensors if key.endswith(TOKENS))
        wanted = {k: own for k, own in wanted.items() if first[str(own)] == k or any(end.endswith(k) for end in ends)}
    try:
        tokens = find_tokens(model, wanted, name, taken, ties=ties)
    except LowRankError as error:
        return {}, {}, [str(error).removeprefix("add_lora_: ").removesuffix(".")]
    firsts = {id(rows.rows): weight for weight, rows in reversed(tokens.items())}
    keys = {token_key(w.owner): tuple(rows.rows.shape) for w, rows in tokens.items() if firsts[id(rows.rows)] == w}
    return tokens, keys, []


@torch.no_grad()
def fill_tokens(tokens: Mapping[AdaptedWeight, TokenRows], tensors: Mapping[str, Tensor]) -> None:
    """Puts the file's rows in, as differences from those of the base."""
    for weight, rows in tokens.items():
        if token_key(weight.owner) in tensors:
            base = base_rows(weight, rows.tokens)
            rows.rows.copy_(tensors[token_key(weight.owner)].to(base) - base)


def _trouble(model: nn.Module, read: Read, name: str) -> str | None:
    """Why the adapter cannot be put on its layer."""
    slot, module = read.slot, read.slot.module
    bank = bank_of(module, slot.parameter)
    if bank is not None and (name in bank.names or bank.merged is not None):
        state = f"an adapter {name!r} already" if name in bank.names else "adapters that are merged"
        return f"{slot.owner!r} has {state}"
    if is_derived(module) and bank is None:
        return f"{slot.owner!r} is parametrized; fold it first"
    if len(module_aliases(model)[module]) > 1:
        return (
            f"{slot.owner!r} has several names ({module_aliases(model)[module]}), of which PEFT adapts the first only"
        )
    if slot.weight.is_meta or not slot.weight.is_floating_point():
        return f"{slot.owner!r} is {slot.weight.dtype} on {slot.weight.device}, expected floating point with values"
    whole = fast_call(module) is None
    if is_factored(module) and (whole or read.magnitude is not None):
        return f"{slot.owner!r} is a {type(module).__name__}, which never forms its weight; call densify_ first"
    if read.mixed and (whole or is_factored(module)):
        return (
            f"{slot.owner!r} is a {type(module).__name__}, and its adapter reads the channels of all groups, which only"
            " torch's own convolutions can be given"
        )
    if read.bias is not None and whole:
        return f"{slot.owner!r} is a {type(module).__name__}, which can have no lora_bias"
    return None


def _adapter(read: Read, dtype: torch.dtype | None) -> Adapter:
    like = read.slot.weight
    a, b, magnitude, bias = (
        None if t is None else t.to(like.device, adapter_dtype(like, dtype)).clone().contiguous()
        for t in (read.a, read.b, read.magnitude, read.bias)
    )
    assert a is not None
    assert b is not None
    # where a weight is read as a whole there is no input to drop out from; PEFT does not either
    dropout = read.dropout if fast_call(read.slot.module) is not None else 0.0
    cls = MixedGroups if read.mixed else Adapter
    return cls(a, b, scaling=read.scaling, dropout=dropout, magnitude=magnitude, bias=bias)


def _copy(
    module: nn.Module,
    owner: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> nn.Module:
    """The copy of a module that the file holds."""
    copy = plain_copy(module, dtype)
    own = own_tensors(copy)
    with torch.no_grad():
        for key, place in keys.items():
            if place.startswith(f"{owner}."):
                own[place.removeprefix(f"{owner}.")].copy_(tensors[key])
    return copy
