"""Putting adapters on a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibrate.statistics import Statistics
from ..errors import LowRankError
from ..modules.attention import mind_fast_paths_
from ..modules.tree import check_model
from ..rank import Rank, check_rank
from .adapted_weight import AdaptedWeight
from .adapter import Adapter, adapter_dtype, check_dtype
from .attach import attach_, freeze_
from .checks import check_adaptable
from .inits import INITS, Init, Start
from .lookup import Source, tensor_for
from .ranks import explained_ranks, moment_of, note_lowered, of_pattern, rank_for
from .target import Target, targets
from .tokens import Tokens, find_tokens
from .whole import attach_whole_, find_whole

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
    init: Init = "kaiming",
    rank_pattern: Mapping[str, Rank] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dora: bool = False,
    freeze_a: bool = False,
    bias: bool = False,
    dtype: torch.dtype | None = None,
    stats: Statistics | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    reference: Source | None = None,
    seed: int | None = None,
) -> nn.Module:
    r"""Adds :math:`\tfrac{\alpha}{r} B A` to chosen weights, in place, and freezes everything else (Hu et al., 2022).

    Modules stay what they are: an ``nn.Linear`` is still one, the keys of its own parameters are unchanged, and a state
    dict of the base still loads. Whatever reads an adapted weight (a fused attention, a recurrent kernel, torch's fast
    paths) sees it with its adapters.

    Args:
        model: any model, compressed ones included.
        target: what to adapt: a list of names of modules or of the ends of them (with a parameter's name behind, only
            that parameter), ``"all-linear"``, a regular expression that must match the whole name, or a predicate
            ``(name, module) -> bool``. ``"all-linear"`` is every linear layer; of a transformers model it leaves out
            the output head (``lm_head``, ``score``, ``classifier``), as in PEFT.
        rank: of the product: an integer, or a rank rule that reads the singular values of what the init takes its
            directions from (the weight, for ``"eva"`` the inputs, for ``"lora-ga"`` the gradient). Where a matrix has
            no more, an integer is lowered to what it has, with a warning that names the layers.
        alpha: the product is scaled by ``alpha / rank``; ``None`` is ``rank``, a scale of one.
        name: of the adapter; several coexist.
        dropout: on the input of ``A``, in training. Where a weight is read instead of called it cannot be applied.
        init: ``"kaiming"`` (the usual one: ``B`` is zero; of an embedding ``A``, so that only rows that occur learn),
            ``"gaussian"``, ``"orthogonal"``, ``"pissa"``, ``"olora"``, ``"eva"`` and ``"corda"``, which look at the
            inputs and need ``stats``, ``"lora-ga"``, which looks at the ``gradients``, and ``"loftq"``, which restores
            what quantising took from ``reference``. PiSSA, OLoRA, CorDA and LoRA-GA start from a product that is not
            zero, which is taken off again: the base is never touched.
        exclude: what to leave out of the target, in the same ways.
        modules_to_save: names, or ends of names, of modules that this adapter trains whole, such as a new classifier:
            it gets a copy of each, which is used, switched, saved and taken off with the adapter. The base keeps its
            own, and the target takes nothing in them.
        trainable_tokens: indices of tokens whose rows of the input embedding this adapter trains, as it does the rest:
            a list, or lists by the names of embeddings or heads. A tied head sees the same rows. ``target=[]`` trains
            nothing else.
        rank_pattern: ranks for the modules or parameters of these names or ends of names; also rules.
        alpha_pattern: likewise alpha.
        rslora: scales by ``alpha / sqrt(rank)`` (Kalajdzievski, 2023).
        dora: trains the lengths of the outputs too (Liu et al., 2024).
        freeze_a: trains ``B`` only (LoRA-FA; Zhang et al., 2023); of an embedding, whose ``A`` starts at zero, only
            ``A``.
        bias: adds a trained bias to the output of linear layers.
        dtype: of the adapters and of modules that are trained whole; ``None`` is fp32, also on a base in half
            precision, where the outputs stay in the dtype of the base.
        stats: what :func:`calibrate` returned for this model. With ``"eva"`` the ranks are redistributed: the
            directions that explain most of their layer's inputs share ``rank`` times the number of layers.
        gradients: for ``"lora-ga"``, what :func:`weight_gradients` returned for this model: by the weights' names.
            The rank is then at most half of the smaller side (Wang et al., 2024).
        reference: for ``"loftq"``, the model before its weights were quantised, or its state dict: the adapters start
            at the best approximation of the difference, which stays on (Li et al., 2023). The base may be quantised in
            place, by torchao (linear layers), or compressed.
        seed: of the initial values; ``None`` draws from the global generator.

    Returns:
        The model.

    Raises:
        LowRankError: if nothing matches, the name is taken, or an init does not fit;
            the model is as it was then.

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
    if "." in name or not name:
        raise LowRankError(f"add_lora_: got name {name!r}, expected one without dots.")
    if not 0 <= dropout < 1:
        raise LowRankError(f"add_lora_: got dropout {dropout!r}, expected a number in [0, 1).")
    if init not in INITS:
        raise LowRankError(f"add_lora_: got init {init!r}, expected one of {list(INITS)}.")
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
    shared: dict[AdaptedWeight, int] = {}
    if init == "eva" and isinstance(rank, int):
        shared = explained_ranks({weight: weight.layout.limit(weight.base) for weight in chosen}, stats, rank)
    for weight in chosen:
        values, kind = weight.values, weight.layout
        sources = moment_of(stats, weight), tensor_for(gradients, weight), tensor_for(reference, weight)
        own_dtype = adapter_dtype(values, dtype)
        seen = Start(values, kind, 1, 1.0, generator, *sources, dtype=own_dtype, lookup=weight.is_lookup)
        asked = of_pattern(rank_pattern, weight, shared.get(weight, rank))
        own_rank = rank_for(asked, init, seen, weight.name, lowered)
        own_alpha = of_pattern(alpha_pattern, weight, float(own_rank) if alpha is None else alpha)
        scaling = own_alpha / (math.sqrt(own_rank) if rslora else own_rank)
        has_bias = bias and isinstance(weight.module, nn.Linear)
        start = INITS[init](replace(seen, rank=own_rank, scaling=scaling))
        adapter = Adapter(
            start.a,
            start.b,
            scaling=scaling,
            dropout=dropout,
            start=start.taken_off,
            magnitude=kind.lengths(start.whole(values, kind, scaling)).to(own_dtype) if dora else None,
            bias=start.a.new_zeros(kind.matrix(values).shape[-2]) if has_bias else None,
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
    freeze_(model)
    for weight, adapter in (made | rows).items():
        attach_(weight, name, adapter)
    for module in whole.values():
        attach_whole_(module, name, dtype=dtype)
    mind_fast_paths_(model)
    note_lowered(lowered, "add_lora_", 2)
    return model
