"""Smaller heads of attention, in a model that its class still describes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ...calibrate import MaskOf, calibrate, check_batches
from ...calibrate.example import first_sample
from ...checks import is_integer
from ...errors import LowRankError
from ...modules import check_model
from ..damping import Damping
from ..recovery.scoring import samples_of
from .choices import HeadChoices
from .entries import refit
from .find import find_attentions
from .problem import value_moment
from .sizes import HeadSizes


@torch.no_grad()
def reduce_head_dim_(
    model: nn.Module,
    data: Iterable[Any],
    head_dim: int,
    *,
    context: int = 1024,
    damping: Damping | None = None,
    mask: MaskOf | None = None,
    progress: bool = False,
) -> nn.Module:
    """Makes the heads of a language model's attentions smaller, in place: queries, keys, values and what reads them.

    The result is an ordinary model of the same class with another ``head_dim`` in its configuration:
    ``save_pretrained`` writes a folder that ``from_pretrained`` reads without this library. Its cache and its attention
    become smaller with the heads, which low-rank projections do not bring. Attentions have to be those of a Llama, as
    in Mistral and Qwen2; others are refused.

    Where only parameters matter, low-rank layers are better for queries and keys, and this is better for values. With
    three quarters of the parameters of its value and output projections SmolLM2 has the perplexity 36.8 with smaller
    heads and 44.8 with layers in pivot form (dense: 34.9); with three quarters of those of queries and keys 42.5 and
    35.0.

    Values keep the entries of which the output projection says most, and a regression on ``data`` makes up for the
    others, as for the units of :func:`remove_units_`. Of queries and keys RoPE turns pairs of entries, each at its own
    frequency. Pairs of about the same frequency turn together, and a complex singular value decomposition leaves fewer
    of them; which, and how many, is the choice that loses least of what tells keys apart, alike in all layers. The
    frequencies stand in the configuration as the factors of LongRoPE. (MoDeGPT, Lin et al., 2025, has the values'
    decomposition, and keeps other pairs in each head, which no configuration can say.)

    Args:
        model: a trained model of transformers, without low-rank layers.
        data: the batches that :func:`calibrate` takes.
        head_dim: how many entries a head has then; an even number.
        context: the largest distance of two tokens that counts in the choice of frequencies. With a short one more
            pairs turn together, and more is left of them. SmolLM2 with 56 of 64 entries has perplexity 37.5 in windows
            of 512 tokens and 23.7 in one of 2,048 with 1024 (dense: 34.9 and 19.6), and 49.0 and 37.5 with 8192.
        damping: a ridge on the moments, by default ``Damping()``; that of gradients is not used.
        mask: what is padding in a batch, as in :func:`calibrate`.
        progress: shows a progress bar.

    Returns:
        The model.

    Raises:
        LowRankError: if the attentions are of another kind, the size is not an even number below the present one, or a
            batch is bad; the model is bit-identical then.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=2, **sizes))
        >>> tokens = torch.randint(100, (4, 32))
        >>> model = lr.reduce_head_dim_(model, [{"input_ids": tokens}], head_dim=12)
        >>> model.config.head_dim, model.model.layers[0].self_attn.k_proj
        (12, Linear(in_features=64, out_features=24, bias=False))
    """
    check_model(model)
    check_batches(data, "reduce_head_dim_")
    attentions, rotary = find_attentions(model)
    old = attentions[0].size
    if not is_integer(head_dim, 2) or head_dim % 2 or head_dim >= old:
        raise LowRankError(f"reduce_head_dim_: got head_dim={head_dim!r}, expected an even number below {old}.")
    if not is_integer(context, 1):
        raise LowRankError(f"reduce_head_dim_: got context={context!r}, expected a number of tokens.")
    batches = data if isinstance(data, (list, tuple)) else list(data)
    if not batches:
        raise LowRankError("reduce_head_dim_: got no batches in data.")
    sizes = HeadSizes(model, attentions, rotary)
    sizes.check(first_sample(batches[0], samples_of(batches[0])), head_dim)
    names = {f"{each.name}.{key}" for each in attentions for key in ("k_proj", "o_proj")}
    stats = calibrate(model, batches, target=[lambda name, _: name in names], mask=mask, progress=progress)
    ridge = Damping(inputs=(damping or Damping()).inputs)
    choices = HeadChoices(attentions, rotary.frequencies, stats, ridge, context)
    kept, weights = choices.kept(head_dim), []
    for attention in attentions:
        maps = kept.maps[attention.name]
        weight, bias = attention.projection("o_proj")
        moment = value_moment(attention, stats[f"{attention.name}.o_proj"], ridge)
        outputs = refit(weight, moment, maps.all_values(attention.heads))
        weights.append({**maps.cut(attention), "o_proj": (outputs, bias)})
    sizes.put_(weights, head_dim, kept.frequencies)
    return model
