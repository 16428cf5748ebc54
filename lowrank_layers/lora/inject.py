"""``add_lora_``: adapters for chosen weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ..errors import LowRankError
from ..modules import check_model
from ..rank import Rank, check_rank
from .adapted_weight import AdaptedWeight
from .adapter import Adapter, adapter_dtype, check_dtype
from .attach import adapting, attach_, check_new_name
from .checks import check_adaptable
from .inits import find_init
from .inits.base import InitContext, LoRAInit
from .modules_to_save import attach_whole_, find_whole
from .ranks import note_lowered, of_pattern, rank_for, warn_unmatched
from .target import Target, targets
from .trainable_tokens import Tokens, find_tokens

DEFAULT = "default"


def add_lora_(
    model: nn.Module,
    target: Target = "all-linear",
    rank: Rank = 8,
    alpha: float | None = None,
    *,
    name: str = DEFAULT,
    exclude: Target | None = None,
    modules_to_save: Iterable[str] | None = None,
    trainable_tokens: Tokens | None = None,
    dropout: float = 0.0,
    init: str | LoRAInit = "kaiming",
    rank_pattern: Mapping[str, Rank] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dora: bool = False,
    freeze_a: bool = False,
    bias: bool = False,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> nn.Module:
    r"""Adds :math:`\tfrac{\alpha}{r} B A` to chosen weights, in place, and freezes everything else (Hu et al., 2022).

    An adapted module stays an instance of its class, the keys of its own parameters are unchanged, and a state dict of
    the base still loads. Whatever reads an adapted weight (a fused attention, a recurrent kernel, torch's fast
    paths) sees it with its adapters.

    Args:
        model: any model, compressed ones included.
        target: what to adapt: a list of names of modules or of the ends of them (with a parameter's name behind, only
            that parameter), ``"all-linear"``, a regular expression that must match the whole name, or a predicate
            ``(name, module) -> bool``. ``"all-linear"`` is every linear layer; of a transformers model it leaves out
            the output head (``lm_head``, ``score``, ``classifier``), as in PEFT.
        rank: rank of the adapters: an integer, or a rank rule that reads the singular values of what the init takes its
            directions from (the weight; for EVA the inputs, for LoRA-GA the gradient). Where a matrix has no more, an
            integer is lowered to what it has, with a warning that names the layers.
        alpha: the product is scaled by ``alpha / rank``; ``None`` stands for ``rank``, a scale of one.
        name: name of the adapter; a model can have several.
        exclude: what to leave out of the target, in the same forms.
        modules_to_save: names, or ends of names, of modules that this adapter trains whole, such as a new classifier:
            it gets a copy of each, which is used, switched, saved and removed with the adapter. The base keeps its
            own, and the target selects nothing in them.
        trainable_tokens: indices of tokens whose rows of the input embedding this adapter trains as well: a list, or
            lists by the names of embeddings or heads. A tied head sees the same rows. With ``target=[]`` nothing else
            is trained.
        dropout: probability of dropout on the input of ``A`` in training, with a mask of its own for every layer. It
            cannot be applied to weights that are read as a whole, such as those of an attention.
        init: how the adapters start: ``"kaiming"``, ``"gaussian"``, ``"orthogonal"``, ``"pissa"`` or ``"olora"``, or an
            object: :class:`EVA` or :class:`CorDA`, which look at the inputs, :class:`LoRAGA`, which looks at the
            gradients, :class:`LoftQ`, which restores what quantizing took, or your own :class:`LoRAInit`. Of
            ``"kaiming"``, ``"gaussian"``, ``"orthogonal"`` and EVA ``B`` starts at zero (of an embedding ``A``, so that
            only rows that occur learn). PiSSA, OLoRA, CorDA and LoRA-GA start from a product that is not zero and is
            taken off again; the base is never written.
        rank_pattern: ranks, or rank rules, by the names of modules or parameters, or ends of such names. Keys that
            match nothing are ignored with a warning.
        alpha_pattern: values of ``alpha`` by such names.
        rslora: scales by ``alpha / sqrt(rank)`` (Kalajdzievski, 2023).
        dora: trains the lengths of the weight's output vectors too (Liu et al., 2024).
        freeze_a: trains only ``B`` (LoRA-FA; Zhang et al., 2023); of an embedding, whose ``A`` starts at zero, only
            ``A``.
        bias: adds a trained bias to the output of linear layers.
        dtype: dtype of the adapters and of modules that are trained whole; ``None`` is fp32, also on a base in half
            precision, where the outputs keep the dtype of the base.
        seed: seed of the initial values; ``None`` draws them from the global generator.

    Returns:
        The model.

    Raises:
        LowRankError: if nothing matches, the name is taken, or an init does not fit; nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> x = torch.randn(4, 64)
        >>> before = model(x)
        >>> lr.add_lora_(model, target=["0"], rank=4, alpha=8)[0].__class__.__bases__[-1].__name__
        'Linear'
        >>> torch.equal(model(x), before), [name for name, p in model.named_parameters() if p.requires_grad]
        (True, ['0.lora_weight.adapters.default.A', '0.lora_weight.adapters.default.B'])
    """
    check_model(model, quantized=True)
    check_new_name(name, "add_lora_")
    if not 0 <= dropout < 1:
        raise LowRankError(f"add_lora_: got dropout {dropout!r}, expected a number in [0, 1).")
    start = find_init(init)
    check_rank(rank, "add_lora_")
    check_dtype(dtype, "add_lora_")
    whole = find_whole(model, modules_to_save or (), name)
    chosen = [] if target == [] and trainable_tokens else targets(model, target, exclude, whole)
    rows = find_tokens(model, trainable_tokens, name, {weight.owner for weight in chosen} | set(whole))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made: dict[AdaptedWeight, Adapter] = {}
    lowered: dict[str, int] = {}
    for weight in chosen:
        check_adaptable(weight, name, dora)
    contexts = [InitContext(weight, generator=generator) for weight in chosen]
    shared = start.ranks(contexts, rank) if isinstance(rank, int) else [rank] * len(contexts)
    for context, share in zip(contexts, shared, strict=True):
        weight, layout = context.weight, context.weight.layout
        own_rank = rank_for(of_pattern(rank_pattern, weight, share), start, context, lowered)
        own_alpha = of_pattern(alpha_pattern, weight, float(own_rank) if alpha is None else alpha)
        scaling = own_alpha / (math.sqrt(own_rank) if rslora else own_rank)
        context = replace(context, rank=own_rank, scaling=scaling)
        factors = start.factors(context)
        values = weight.values
        own_dtype = adapter_dtype(values, dtype)
        a, b = context.in_layout(factors, own_dtype)
        added = 0 if factors.subtract else scaling * layout.product(a.float(), b.float())
        has_bias = bias and isinstance(weight.module, nn.Linear)
        adapter = Adapter(
            a,
            b,
            scaling=scaling,
            dropout=dropout,
            start=(a.clone(), b.clone()) if factors.subtract else None,
            magnitude=layout.lengths(values.float() + added).to(own_dtype) if dora else None,
            bias=a.new_zeros(layout.matrix(values).shape[-2]) if has_bias else None,
        )
        if freeze_a:
            (adapter.A if bool(adapter.A.any()) else adapter.B).requires_grad_(False)
        if (dropout or bias) and weight.is_read_whole:
            raise LowRankError(
                f"add_lora_: {weight.name!r} is read as a whole, by its owner or by a method that was"
                " replaced on the instance: there is no input to drop out from and no output to add a bias to; give"
                " dropout=0 and bias=False for it."
            )
        made[weight] = adapter
    note_lowered(lowered, "add_lora_", 2)
    warn_unmatched({"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}, chosen)
    with adapting(model):
        for weight, adapter in (made | rows).items():
            attach_(weight, name, adapter)
        for module in whole.values():
            attach_whole_(module, name, dtype=dtype)
    return model
