"""Key and value projections at low rank, so that any cache of transformers holds latents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ...calibrate.moments import Moments
from ...calibrate.statistics import Statistics
from ...errors import LowRankError, UnsupportedLayerError
from ...modules import Selector, check_model, reasons_to_keep, replace_, select
from ...rank import Rank, check_rank
from ..subspace import Scatter, chosen_ranks
from .latent_attention import LatentAttention, LatentProjection
from .layouts import check_layout, decoder_attentions, output_of, rotation_tried_out


@torch.no_grad()
def factorize_kv_(
    model: nn.Module,
    stats: Statistics | None = None,
    rank: Rank = 16,
    *,
    value_rank: Rank | None = None,
    joint: bool = True,
    target: Iterable[Selector] | None = None,
) -> nn.Module:
    r"""Factorizes the key and value projections of a transformers decoder, so that its cache holds small latents.

    ``k_proj`` becomes :math:`U_k D_k` and ``v_proj`` :math:`U_v D_v`, and what the model hands to its cache is
    :math:`D_k x` and :math:`D_v x`, ``[batch, 1, tokens, rank]``, in place of keys and values: an ordinary
    ``DynamicCache`` shrinks, and ``generate`` with beams or padding on the left works as before. Keys of a tile of
    tokens are rebuilt and rotated at a time; without a rotation the queries are brought into the subspace instead. (A
    prompt has its own keys and values rebuilt for the time of one layer, as a dense model has.)
    :math:`U_v` is multiplied into the output projection wherever that does not make it larger (a group of heads has
    no more latents than a head has entries), and else is applied to the weighted sum of latents.

    Attentions become :class:`~lowrank_layers.kv_cache.LatentAttention`, once it has computed the same for random
    inputs. Their weights train, and copy, and load into a model factorized to the same ranks. Attention weights are
    not returned, and attention dropout is not applied.

    Args:
        model: the model, changed in place: a decoder of transformers with ``q_proj``, ``k_proj`` and ``v_proj`` (Llama,
            Qwen, Mistral, Gemma, Phi, Granite, Cohere, OPT, GPT-OSS...) and the attention implementation sdpa or eager.
        stats: statistics from :func:`lowrank_layers.calibrate`: the keys and values of those inputs are then kept best,
            :math:`\min \lVert (W - U D) X^{1/2} \rVert` with their covariance :math:`X`, and what is lost of their mean
            goes into a bias; ``None`` keeps the weights best.
        rank: number of latents per token and head, for keys and for values: an integer, or a rank rule that looks at
            the spectrum.
        value_rank: number of latents per token and head for values; ``None`` takes ``rank``.
        joint: whether all heads share one subspace, with as many directions as their own subspaces would have together.
            A shared subspace takes as many bytes per token and loses less; one per head needs less arithmetic.
        target: names of attentions or of modules around them, types, or predicates; ``None`` takes all attentions.

    Returns:
        The model.

    Raises:
        LowRankError: for a bad rank, statistics that do not fit, or an attention of another layout; nothing is changed
            then.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM  # doctest: +SKIP
        >>> model = LlamaForCausalLM.from_pretrained("path")  # doctest: +SKIP
        >>> stats = lr.calibrate(model, batches)  # doctest: +SKIP
        >>> lr.factorize_kv_(model, stats, rank=32).generate(ids, max_new_tokens=100)  # doctest: +SKIP

    Chang et al., "Palu: Compressing KV-Cache with Low-Rank Projection", 2024; DeepSeek-AI, "DeepSeek-V2", 2024.
    """
    ranks = (rank, rank if value_rank is None else value_rank)
    for each in ranks:
        check_rank(each, "factorize_kv_")
    if stats is not None and not isinstance(stats, Statistics):
        raise LowRankError(f"factorize_kv_: got stats {type(stats).__name__}, expected what lr.calibrate returns.")
    check_model(model)
    found = dict(decoder_attentions(model))
    if target is not None:
        taken = select(model, target, "target")
        found = {name: module for name, module in found.items() if name in taken}
    if not found:
        raise LowRankError(
            "factorize_kv_: found no attention with k_proj and v_proj, expected a decoder of transformers"
            f"{'' if target is None else ' and a target= that names its attentions'}; its docstring lists which."
        )
    request = _Request(stats, ranks, joint, reasons_to_keep(model))
    sides = {name: request.sides(name, each) for name, each in found.items()}
    replace_(model, {name: request.factorized(name, each, sides[name]) for name, each in found.items()})
    return model


@dataclass(frozen=True)
class _Side:
    """A projection to keys or values, and the rank that it gets.

    Args:
        linear: the projection.
        inputs: moments of its inputs.
        size: number of outputs of a head.
        heads: number of heads that share a subspace.
        rank: rank per head, or a rule.
    """

    linear: nn.Linear
    inputs: Moments | None
    size: int
    heads: int
    rank: Rank


@dataclass(frozen=True)
class _Request:
    """What was asked for, and what of the model has to stay.

    Args:
        stats: statistics of the projections' inputs.
        ranks: ranks of keys and of values.
        joint: whether all heads share one subspace.
        reasons: why layers cannot be replaced, by name.
    """

    stats: Statistics | None
    ranks: tuple[Rank, Rank]
    joint: bool
    reasons: dict[str, str]

    def sides(self, name: str, attention: nn.Module) -> list[_Side]:
        """The two projections of an attention, once everything about them is checked."""
        check_layout(name, attention)
        size = attention.head_dim
        assert isinstance(size, int)
        sides = []
        for key, rank in zip(("k_proj", "v_proj"), self.ranks, strict=True):
            label = f"{name}.{key}"
            linear = self._checked(label, attention.get_submodule(key))
            if isinstance(rank, int) and rank > size:
                raise LowRankError(
                    f"factorize_kv_: got rank {rank} for {label!r}, whose heads have {size} entries, expected at most"
                    " that many."
                )
            heads = linear.out_features // size if self.joint else 1
            sides.append(_Side(linear, self._inputs(label, linear), size, heads, rank))
        return sides

    def factorized(self, name: str, attention: nn.Module, sides: list[_Side]) -> LatentAttention:
        """The attention with its projections factorized."""
        rotation, scale = rotation_tried_out(name, attention)
        keys, values = map(_pair, sides)
        output, size = output_of(attention), sides[1].size
        assert output is not None
        if f"{name}.{output[0]}" not in self.reasons and _absorbs(attention, values, output[1], size):
            output = (output[0], _absorbed(values, output[1], size))
            values = LatentProjection(values.down, [], None, values.groups)
        return LatentAttention(attention, keys, values, output, rotation, scale)

    def _checked(self, label: str, linear: nn.Module) -> nn.Linear:
        if label in self.reasons:
            raise UnsupportedLayerError(f"factorize_kv_: {label!r} cannot be replaced: {self.reasons[label]}.")
        if type(linear) is not nn.Linear:
            raise UnsupportedLayerError(
                f"factorize_kv_: {label!r} is a {type(linear).__name__}, expected a plain nn.Linear; merge its adapters"
                " or densify it first."
            )
        weight = linear.weight
        if weight.is_meta or not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            raise LowRankError(
                f"factorize_kv_: the weight of {label!r} is {weight.dtype} on {weight.device}, or has NaN or Inf;"
                " expected finite floating point in memory."
            )
        return linear

    def _inputs(self, label: str, linear: nn.Linear) -> Moments | None:
        """The moments of a projection's inputs."""
        if self.stats is None:
            return None
        if label not in self.stats:
            raise LowRankError(f"factorize_kv_: stats have nothing about {label!r}; calibrate this very model.")
        inputs = self.stats[label].inputs
        if inputs.second.shape != (linear.in_features, linear.in_features):
            raise LowRankError(
                f"factorize_kv_: stats of {label!r} are {tuple(inputs.second.shape)}, expected {linear.in_features}"
                " inputs squared; calibrate this very model."
            )
        return inputs


def _pair(side: _Side) -> LatentProjection:
    r"""The best pair of projections for the heads that share a subspace.

    :math:`U` has the leading eigenvectors of :math:`W X W^T`, which are the left singular vectors of
    :math:`W X^{1/2}`, and :math:`D = U^T W`: then :math:`U D X^{1/2}` is the truncated SVD of :math:`W X^{1/2}`.
    """
    linear, inputs = side.linear, side.inputs
    device = torch.device("cpu") if linear.weight.device.type == "mps" else linear.weight.device
    weight = linear.weight.detach().to(device, torch.float64).unflatten(0, (-1, side.heads * side.size))
    seen = weight if inputs is None else weight @ inputs.covariance().to(weight)
    mean = weight.new_zeros(weight.shape[:2]) if inputs is None else weight @ inputs.mean.to(weight)
    scatter = Scatter(linear.in_features, mean[None], (seen @ weight.mT)[None])
    ranks = [min(each, linear.in_features) for each in chosen_ranks(side.rank, scatter, side.heads, "factorize_kv_")]
    bases = [
        each[:, :count] for each, count in zip(scatter.fit(max(ranks), torch.float64).basis[0], ranks, strict=True)
    ]
    down = nn.utils.skip_init(nn.Linear, linear.in_features, sum(ranks), bias=False).to(linear.weight)
    down.weight.copy_(torch.cat([basis.mT @ rows for basis, rows in zip(bases, weight, strict=True)]))
    down.weight.requires_grad_(linear.weight.requires_grad)
    bias: nn.Parameter | None = linear.bias
    if inputs is not None:
        lost = torch.cat([each - basis @ (basis.mT @ each) for basis, each in zip(bases, mean, strict=True)])
        lost = lost if bias is None else bias.to(lost) + lost
        bias = nn.Parameter(lost.to(linear.weight), requires_grad=linear.weight.requires_grad)
    same = len(set(ranks)) == 1
    ups = [torch.stack(bases)] if same else [basis[None] for basis in bases]
    return LatentProjection(down, [up.to(linear.weight).contiguous() for up in ups], bias, len(bases))


def _absorbs(attention: nn.Module, values: LatentProjection, output: nn.Module, size: int) -> bool:
    """Whether the output projection takes the up-projection in: it must not grow, and a bias must be a constant."""
    # weights sum to one, and so pass a bias on, only where no sink takes a part of them
    constant = values.bias is None or getattr(attention, "sinks", None) is None
    return type(output) is nn.Linear and constant and len(values.up) == 1 and values.up[0].shape[2] <= size


def _absorbed(values: LatentProjection, output: nn.Module, size: int) -> nn.Linear:
    r"""For query head :math:`h`, with values of head :math:`g`: :math:`W_h U_g`; bias :math:`\sum_h W_h b_g`."""
    assert isinstance(output, nn.Linear)
    weight = output.weight.detach().double().unflatten(1, (-1, size))
    up = values.up[0].detach().double().flatten(0, 1).unflatten(0, (-1, size))
    share = weight.shape[1] // up.shape[0]
    joined = torch.einsum("ohd,hdr->ohr", weight, up.repeat_interleave(share, 0)).flatten(1)
    biases = output._parameters["bias"], values.bias
    biased = any(bias is not None for bias in biases)
    made: nn.Linear = nn.utils.skip_init(nn.Linear, joined.shape[1], joined.shape[0], bias=biased).to(output.weight)
    made.weight.copy_(joined)
    made.requires_grad_(output.weight.requires_grad)
    if biased:
        shift = torch.zeros(joined.shape[0], dtype=torch.float64, device=weight.device)
        if biases[0] is not None:
            shift += biases[0]
        if biases[1] is not None:
            rows = biases[1].double().view(-1, size).repeat_interleave(share, 0)
            shift += torch.einsum("ohd,hd->o", weight, rows)
        made.bias.copy_(shift)
    return made
