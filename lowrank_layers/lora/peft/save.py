"""Writing adapters as PEFT does."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import CheckpointError, LowRankError, UnsupportedLayerError
from ...files import replacing
from ...layers import ConvNd, is_factored
from ...modules import check_model, module_aliases
from ..adapted_weight import AdaptedWeight, banks_of
from ..adapter import Adapter
from ..attach import choose_name
from ..mixed_groups import dora_ratio
from ..tokens import TokenRows, base_rows
from ..weight_layout import SLICES, Kernel, Matrix, is_conv1d, kind_of
from ..whole import copies_of
from .config import BIASES, NOTHING, Config
from .keys import (
    CONFIG,
    EMBEDDING,
    WEIGHTS,
    WHOLE,
    Slot,
    embedding_keys,
    is_plain_target,
    modules_of,
    own_tensors,
    saved_modules,
    to_slots,
    token_key,
    whole_keys,
)

Bias = Literal["none", "all", "lora_only"]
_NEWER = ("lora_bias", "target_parameters", "trainable_token_indices")
"""Settings that older versions of PEFT do not know."""
_Adapters = dict[tuple[str, str, str], Adapter]


def save_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    modules_to_save: Iterable[str] | None = None,
    bias: Bias | None = None,
) -> None:
    """Writes an adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``PeftModel.from_pretrained`` loads it onto the plain base, also where the adapter starts from singular values: such
    a one is written with twice the rank, its start taken off. Both files are written under temporary names and renamed.

    Args:
        model: an adapted model.
        folder: made where it is missing.
        name: of the adapter; may be left out where there is one only.
        modules_to_save: names, or ends of names, of modules of the base to write as a whole, running statistics
            included. By default those outside the adapters whose parameters learn. What the adapter itself trains whole
            (``add_lora_(modules_to_save=)``) is always written.
        bias: which biases of the base to write: ``"none"``, ``"lora_only"``, ``"all"``; by default those that learn.

    Raises:
        UnsupportedLayerError: listing the layers that PEFT has no adapters for (factored, recurrent, transposed).
        LowRankError: for an unknown name.
        CheckpointError: if the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> base = nn.Sequential(nn.Linear(8, 6))
        >>> fresh = nn.Sequential(nn.Linear(8, 6))
        >>> _ = fresh.load_state_dict(base.state_dict())
        >>> model = lr.add_lora_(base, rank=2, init="pissa")
        >>> lr.save_lora(model, folder)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(lr.load_lora(fresh, folder)(x), model(x), atol=1e-6)
        True
    """
    check_model(model, quantized=True)
    name = choose_name(model, name, "save_lora")
    if bias not in (None, *BIASES):
        raise LowRankError(f"save_lora: got bias={bias!r}, expected one of {list(BIASES)}.")
    adapters, problems = _adapters_of(model, name)
    slots, wraps = to_slots(modules_of(model), adapters)
    chosen = None if modules_to_save is None else list(modules_to_save)
    rows, more = _tokens_of(model, name)
    problems += more
    copies = {owner: own[name] for owner, own in copies_of(model).items() if name in own}
    whole, bias, more = _learned_whole(model, wraps, chosen, bias, list(copies))
    problems += more
    if problems:
        raise UnsupportedLayerError(f"save_lora: PEFT's file cannot hold {'; '.join(problems)}.")
    ordered = [(slot, adapters[slot.owner, slot.parameter, slot.label]) for slot in slots]
    config, tensors = _encoded(ordered)
    config.target_modules, config.target_parameters = _targets(model, slots)
    config.trainable_token_indices = {owner: own.tokens.tolist() for owner, (_, own) in rows.items()} or None
    for owner, (module, own_rows) in rows.items():
        base = base_rows(AdaptedWeight(owner, "weight", module), own_rows.tokens)
        tensors[token_key(owner)] = base + own_rows.rows.detach()
    config.bias, config.modules_to_save = bias, sorted(whole) or None
    own = own_tensors(model)
    own |= {f"{owner}.{key}": value for owner, copy in copies.items() for key, value in copy.state_dict().items()}
    for key, place in whole_keys(model, bias, saved_modules(model, whole), wraps).items():
        tensors[key] = own[place].detach()
    for key, place in embedding_keys(model, wraps).items():
        if hasattr(own[place], EMBEDDING):
            tensors.setdefault(key, own[place].detach())
    if any(tensor.is_meta for tensor in tensors.values()):
        raise CheckpointError("save_lora: a tensor is on the meta device and has no values to write.")
    body = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
    body["fan_in_fan_out"] = any(is_conv1d(slot.module) for slot in slots)
    body |= {k: v for k, v in asdict(config).items() if k not in _NEWER or v}
    files = {key: tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / CONFIG) as settings, replacing(path / WEIGHTS) as weights:
            settings.write_text(json.dumps(body, indent=2, sort_keys=True), encoding="utf-8")
            save_file(files, weights, metadata={"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"save_lora: cannot write to {path}: {error}") from None


def _adapters_of(model: nn.Module, name: str) -> tuple[_Adapters, list[str]]:
    """The adapters by module, parameter and PEFT's label, and the layers that PEFT has none for."""
    modules, aliases = modules_of(model), module_aliases(model)
    found: _Adapters = {}
    problems = []
    for owner, module in modules.items():
        for parameter, bank in banks_of(module).items():
            if name not in bank.adapters:
                continue
            adapter = bank.adapters[name]
            assert isinstance(adapter, Adapter)
            if isinstance(adapter, TokenRows):
                continue
            attention = owner.rpartition(".")[0] if owner.endswith("out_proj") else owner
            inside = isinstance(modules.get(attention), nn.MultiheadAttention)
            label = attention if inside else owner if is_plain_target(module) else f"{owner}.{parameter}"
            why = _why_not(modules.get(attention, module) if inside else module, parameter, label, adapter)
            if not owner or not label:
                why = "is the model itself, which has no name"
            elif len(aliases[module]) > 1:
                why = f"has several names ({', '.join(aliases[module])})"
            if why:
                problems.append(f"{'.'.join(filter(None, (owner, parameter)))!r}, which {why}")
            found[owner, parameter, label] = adapter
    for owner, parameter, label in [] if problems else list(found):
        # PEFT adapts both projections of an attention, or none
        if isinstance(modules.get(label), nn.MultiheadAttention):
            for place in ((label, "in_proj_weight", label), (f"{label}.out_proj", "weight", label)):
                if place not in found:
                    found[place] = _nothing(modules[place[0]], place[1], found[owner, parameter, label])
    return found, problems + _mixtures(modules, found)


def _tokens_of(model: nn.Module, name: str) -> tuple[dict[str, tuple[nn.Module, TokenRows]], list[str]]:
    """The rows that are trained on their own by their embeddings' names, and what PEFT cannot write."""
    found: dict[str, tuple[nn.Module, TokenRows]] = {}
    problems = []
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for owner, module in modules_of(model).items():
        bank = banks_of(module).get("weight")
        rows = None if bank is None else bank.adapters._modules.get(name)
        if not isinstance(rows, TokenRows):
            continue
        if is_factored(module):
            problems.append(f"{owner!r}, which is a factored embedding with trainable_tokens: call densify_ first")
        elif not (tied and any(rows.rows is other.rows for _, other in found.values())):  # PEFT shares them itself
            found[owner] = module, rows
    return found, problems


def _why_not(module: nn.Module, parameter: str, label: str, adapter: Adapter) -> str | None:
    kind = type(module).__name__.removeprefix("Lora") if hasattr(module, "_plain_class") else type(module).__name__
    if is_factored(module):
        return f"is a {kind}: call densify_ first"
    if parameter in SLICES:
        return "is a part of a fused attention, which PEFT adapts whole: choose 'in_proj_weight'"
    if isinstance(module, nn.MultiheadAttention):
        special = adapter.magnitude is not None or module.in_proj_weight is None
        return "is an attention with kdim, vdim or DoRA" if special else None
    if is_plain_target(module):
        return None if parameter == "weight" else f"is a parameter that PEFT does not look for in a {kind}"
    special = adapter.magnitude is not None or adapter.bias is not None
    if isinstance(module, (nn.RNNBase, ConvNd, nn.EmbeddingBag)) or special or kind_of(module, parameter) != Matrix():
        return f"belongs to a {kind}"
    return None


def _mixtures(modules: Mapping[str, nn.Module], found: _Adapters) -> list[str]:
    """Settings that PEFT has once for all layers."""
    problems = []
    names = [f"'{owner}.{parameter}'" for owner, parameter, _ in found]
    dora = [name for name, adapter in zip(names, found.values(), strict=True) if adapter.magnitude is not None]
    if dora and len(dora) < len(found):
        problems.append(f"DoRA for some layers only ({', '.join(dora)})")
    if any(adapter.bias is not None for adapter in found.values()):
        without = [f"{o}.{p}" for o, p, label in found if not _can_have_bias(modules.get(label))]
        problems += [f"a bias of adapters beside {name!r}, which can have none" for name in without]
    read_whole = [f"{o}.{p}" for o, p, label in found if label == f"{o}.{p}"]
    if read_whole and any(adapter.dropout for adapter in found.values()):
        problems.append(f"dropout beside {', '.join(map(repr, read_whole))}; set it to 0")
    return problems


def _can_have_bias(module: nn.Module | None) -> bool:
    return module is not None and is_plain_target(module) and not isinstance(module, nn.Embedding)


def _nothing(module: nn.Module, parameter: str, beside: Adapter) -> Adapter:
    """An adapter that adds nothing."""
    kind = kind_of(module, parameter)
    weight = module._parameters[parameter]
    assert weight is not None
    a, b = kind.shapes(weight, 1)
    return Adapter(beside.A.new_zeros(a), beside.A.new_zeros(b), scaling=float(beside.scaling))


def _learned_whole(
    model: nn.Module, wraps: Mapping[str, int], chosen: list[str] | None, bias: Bias | None, copied: list[str]
) -> tuple[list[str], Bias, list[str]]:
    """The modules to write whole, the biases, and what PEFT cannot write."""
    whole: list[str] = []
    biases: list[str] = []
    problems = []
    for owner, module in modules_of(model).items():
        all_own = module.named_parameters(recurse=is_factored(module))
        own = [(key, p) for key, p in all_own if ".lora_" not in f".{key}"]
        learned = [key for key, p in own if p.requires_grad or hasattr(p, WHOLE)]
        if learned == ["bias"] and (owner in wraps or len(own) > 1):
            biases.append(owner)
        elif learned and (owner in wraps or not owner):
            problems.append(f"what was learned of {owner!r} itself ({', '.join(learned)}) beside its adapter")
        elif learned:
            whole.append(owner)
    if chosen is not None:
        unknown = [name for name in chosen if not saved_modules(model, [name])]
        if unknown:
            raise LowRankError(f"save_lora: got modules_to_save {unknown}, which the model has not.")
        whole = chosen
    whole += copied
    whole = [name for name in whole if not any(name.startswith(f"{other}.") for other in whole)]
    for name in saved_modules(model, whole):
        inside = [owner for owner in wraps if owner == name or owner.startswith(f"{name}.")]
        problems += [f"{name!r} whole and an adapter of {owner!r} too" for owner in inside]
    if bias is None:
        bias = "none" if not biases else "lora_only" if set(biases) <= set(wraps) else "all"
    return whole, bias, problems


def _encoded(found: list[tuple[Slot, Adapter]]) -> tuple[Config, dict[str, Tensor]]:
    """The settings and the tensors of all adapters."""
    by_label: dict[str, list[tuple[Slot, Adapter]]] = defaultdict(list)
    for slot, adapter in found:
        by_label[slot.label].append((slot, adapter))
    with_bias = any(adapter.bias is not None for _, adapter in found)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for label, group in by_label.items():
        coded = [slot.encode(adapter) for slot, adapter in group]
        ranks[label] = max(rank for _, _, rank in coded)
        scaling = next((s for _, adapter in group if (s := float(adapter.scaling))), 1.0)
        alphas[label] = _tidy(scaling * ranks[label])
        for (slot, adapter), (a, b, rank) in zip(group, coded, strict=True):
            if len(group) > 1:  # the two projections of an attention share rank and scaling
                a = torch.cat([a, a.new_zeros(ranks[label] - rank, a.shape[1])])
                b = torch.cat([b, b.new_zeros(b.shape[0], ranks[label] - rank)], 1)
            own = float(adapter.scaling)
            tensors[slot.keys["a"]] = a
            tensors[slot.keys["b"]] = b if own == scaling else b * (own / scaling)
            shapes = slot.shapes(ranks[label])
            if adapter.magnitude is not None:
                magnitude = adapter.magnitude.detach()
                if isinstance(slot.kind, Kernel) and slot.kind.groups > 1:
                    magnitude = magnitude / dora_ratio(slot.weight, a, b, own, slot.kind.groups)
                tensors[slot.keys["magnitude"]] = magnitude.reshape(shapes["magnitude"])
            if with_bias:  # PEFT scales it too
                bias = b.new_zeros(shapes["bias"]) if adapter.bias is None else adapter.bias.detach() / scaling
                tensors[slot.keys["bias"]] = bias
    if not found:
        return Config(), {}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = Config(
        r=r,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(label)}": rank for label, rank in ranks.items() if rank != r},
        alpha_pattern={f"^{re.escape(label)}": value for label, value in alphas.items() if value != alpha},
        use_dora=any(adapter.magnitude is not None for _, adapter in found),
        lora_bias=with_bias,
        lora_dropout=max(adapter.dropout for _, adapter in found),
    )
    return config, tensors


def _tidy(value: float) -> float:
    return round(value) if abs(value - round(value)) <= 1e-6 * max(1.0, abs(value)) else value


def _targets(model: nn.Module, slots: list[Slot]) -> tuple[list[str] | str, list[str] | None]:
    """Modules, and parameters that are no module's weight; a regular expression where a name ends others too."""
    parameters = sorted(slot.label for slot in slots if slot.label == f"{slot.owner}.{slot.parameter}")
    labels = sorted({slot.label for slot in slots} - set(parameters))
    names = modules_of(model)
    taken = {name for name in names if any(name == label or name.endswith(f".{label}") for label in labels)}
    if not slots:
        return NOTHING, None
    return labels if taken == set(labels) else "|".join(map(re.escape, labels)), parameters or None
