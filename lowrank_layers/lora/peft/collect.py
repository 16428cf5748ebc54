"""The adapters of a model that go into a file of PEFT's, and what such a file cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ...layers import ConvNd
from ...modules import module_aliases
from ..adapted_weight import AdaptedWeight, adapted_weights, base_modules
from ..adapter import Adapter
from ..trainable_tokens import TokenRows
from ..weight_layout import Matrix
from .keys import is_plain_target


def collect_adapters(
    model: nn.Module, name: str
) -> tuple[dict[AdaptedWeight, Adapter], dict[AdaptedWeight, str], list[str]]:
    """The low-rank adapters of that name, the labels of their weights in PEFT, and what cannot be written, in words."""
    modules, aliases = base_modules(model), module_aliases(model)
    adapters: dict[AdaptedWeight, Adapter] = {}
    labels: dict[AdaptedWeight, str] = {}
    problems = []
    for weight in adapted_weights(model, name):
        adapter = weight.adapter(name)
        if adapter is None or isinstance(adapter, TokenRows):
            continue
        attention = _attention_of(weight, modules)
        owner = weight.owner if attention is None else attention
        label = owner if attention is not None or is_plain_target(weight.module) else weight.name
        why = _why_not(replace(weight, module=modules[owner]), label, adapter)
        if not weight.owner or not label:
            why = "is the model itself, which has no name"
        elif len(aliases[weight.module]) > 1:
            why = f"has several names ({', '.join(aliases[weight.module])})"
        if why:
            problems.append(f"{weight.name!r}, which {why}")
        adapters[weight], labels[weight] = adapter, label
    problems += _mixtures(adapters, labels)
    if not problems:
        _complete_attentions(adapters, labels, modules)
    return adapters, labels, problems


def collect_tokens(model: nn.Module, name: str) -> tuple[dict[AdaptedWeight, TokenRows], list[str]]:
    """The rows of embeddings that are trained on their own, and what PEFT cannot write, in words."""
    found: dict[AdaptedWeight, TokenRows] = {}
    problems = []
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for weight in adapted_weights(model, name):
        rows = weight.adapter(name)
        if not isinstance(rows, TokenRows):
            continue
        if weight.is_factored:
            problems.append(
                f"{weight.owner!r}, which is a factored embedding with trainable_tokens: call densify_ first"
            )
        elif not (tied and any(rows.rows is other.rows for other in found.values())):  # PEFT shares them itself
            found[weight] = rows
    return found, problems


def _attention_of(weight: AdaptedWeight, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the ``nn.MultiheadAttention`` that a weight belongs to, if it does."""
    owner = weight.owner.rpartition(".")[0] if weight.owner.endswith("out_proj") else weight.owner
    return owner if isinstance(modules.get(owner), nn.MultiheadAttention) else None


def _why_not(weight: AdaptedWeight, label: str, adapter: Adapter) -> str | None:
    """Why PEFT has no adapter for a weight, in words; of an attention's output, the module is the attention."""
    module = weight.module
    kind = getattr(module, "_plain_class", type(module)).__name__
    if weight.is_factored:
        return f"is a {kind}: call densify_ first"
    if weight.is_slice:
        return "is a part of a fused attention, which PEFT adapts whole: choose 'in_proj_weight'"
    if isinstance(module, nn.MultiheadAttention):
        special = adapter.magnitude is not None or module.in_proj_weight is None
        return "is an attention with kdim, vdim or DoRA" if special else None
    if is_plain_target(module):
        return None if weight.parameter == "weight" else f"is a parameter that PEFT does not look for in a {kind}"
    special = adapter.magnitude is not None or adapter.bias is not None
    if isinstance(module, (nn.RNNBase, ConvNd, nn.EmbeddingBag)) or special or weight.layout != Matrix():
        return f"belongs to a {kind}"
    return None


def _mixtures(adapters: Mapping[AdaptedWeight, Adapter], labels: Mapping[AdaptedWeight, str]) -> list[str]:
    """What PEFT has one setting of for all layers, and these layers differ in, in words."""
    problems = []
    dora = [f"{weight.name!r}" for weight, adapter in adapters.items() if adapter.magnitude is not None]
    if dora and len(dora) < len(adapters):
        problems.append(f"DoRA for some layers only ({', '.join(dora)})")
    if any(adapter.bias is not None for adapter in adapters.values()):
        without = [weight.name for weight, label in labels.items() if not _can_have_bias(weight, label)]
        problems += [f"a bias of adapters beside {name!r}, which can have none" for name in without]
    read_whole = [f"{weight.name!r}" for weight, label in labels.items() if label == weight.name]
    if read_whole and any(adapter.dropout for adapter in adapters.values()):
        problems.append(f"dropout beside {', '.join(read_whole)}; set it to 0")
    return problems


def _can_have_bias(weight: AdaptedWeight, label: str) -> bool:
    plain = label == weight.owner and is_plain_target(weight.module)
    return plain and not isinstance(weight.module, nn.Embedding)


def _complete_attentions(
    adapters: dict[AdaptedWeight, Adapter], labels: dict[AdaptedWeight, str], modules: Mapping[str, nn.Module]
) -> None:
    """Adds adapters that add nothing, in place: PEFT adapts both projections of an attention, or none."""
    for weight, label in list(labels.items()):
        attention = modules.get(label)
        if isinstance(attention, nn.MultiheadAttention):
            fused = AdaptedWeight(label, "in_proj_weight", attention)
            for other in (fused, AdaptedWeight(f"{label}.out_proj", "weight", attention.out_proj)):
                if other not in adapters:
                    adapters[other], labels[other] = _nothing(other, beside=adapters[weight]), label


def _nothing(weight: AdaptedWeight, beside: Adapter) -> Adapter:
    """An adapter that adds nothing, of rank one, with the scaling of another."""
    a, b = weight.layout.shapes(weight.base, 1)
    return Adapter(beside.A.new_zeros(a), beside.A.new_zeros(b), scaling=float(beside.scaling))
