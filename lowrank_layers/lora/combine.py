"""Several adapters of a model into one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import check_integer, is_number
from ..errors import LowRankError
from ..linalg import exact_svd
from .adapter import Adapter, Bank
from .attach import adapter_names, banks, check_name, check_new_name
from .mixed_groups import MixedGroups
from .module_copies import copies_of, trained_whole_by
from .modules_to_save import attach_whole_
from .switching import check_unmerged, use_adapter
from .task_vectors import PrunedSum
from .trainable_tokens import TokenRows
from .weight_layout import Kernel, WeightLayout

Combination = Literal[
    "svd",
    "cat",
    "concatenation",
    "linear",
    "ties",
    "dare",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
"""The ways to combine adapters, under the names that PEFT has for them."""

_SHORT = {"concatenation": "cat", "dare": "dare_linear"}


@torch.no_grad()
def combine_lora_(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    how: Combination = "svd",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> nn.Module:
    r"""Adds one more adapter that is the weighted sum of others, in place; they stay, and only the new one is in use.

    Every ``how`` gives the delta that PEFT's ``add_weighted_adapter`` gives under the same name. Biases of the adapters
    are summed with their weights, and so are the rows of trained tokens, whatever ``how`` is; a module that one of them
    trains whole is copied as it is.

    Args:
        model: an adapted model.
        weights: a number of either sign for each adapter. A single adapter is only scaled, whatever ``how`` is.
        name: name of the new adapter.
        how: ``"svd"`` (the best approximation of the sum of rank ``rank``, by QR of the factors: the deltas are never
            formed), ``"cat"`` or ``"concatenation"`` (exact, ranks add up) or ``"linear"`` (sums ``A`` and ``B`` apart,
            for equal ranks). Three more prune the factors before they are summed apart: ``"magnitude_prune"`` keeps the
            largest entries, ``"ties"`` also drops those against the sign that outweighs and takes the mean of the
            others (Yadav et al., 2023), ``"dare_linear"`` or ``"dare"`` drops entries at random and scales the others
            up (Yu et al., 2024), and ``"dare_ties"`` does both. With ``_svd`` behind the name they prune the deltas
            themselves, and the sum is approximated at rank ``rank``.
        rank: rank of the result, for ``"svd"`` and the names that end in it; by default the largest of the ranks.
        density: fraction of the entries that pruning keeps, in (0, 1].
        seed: seed of what DARE drops.

    Returns:
        The model.

    Raises:
        LowRankError: for unknown names, a name taken, unequal ranks where they must be equal, DoRA, a module that
            several of the adapters train whole; the model is as it was then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = lr.add_lora_(lr.add_lora_(model, rank=2, name="a"), rank=2, name="b")
        >>> lr.combine_lora_(model, {"a": 0.5, "b": 0.5}, "both")[0].lora_weight.names
        ['a', 'b', 'both']
    """
    check_unmerged(model, "combine_lora_")
    if rank is not None:
        check_integer(rank, "combine_lora_", "rank", 1)
    if how not in get_args(Combination):
        raise LowRankError(f"combine_lora_: got how={how!r}, expected one of {list(get_args(Combination))}.")
    if not is_number(density) or not 0 < density <= 1:
        raise LowRankError(f"combine_lora_: got density={density!r}, expected a number in (0, 1].")
    _check_adapters(model, weights, name)
    method = _SHORT.get(how, how)
    if len(weights) == 1 and (rank is None or not method.endswith("svd")):
        method = "cat"
    pruned_sum = PrunedSum(method.removesuffix("_svd"), density, seed)
    shared: dict[tuple[int, ...], TokenRows] = {}
    made: list[tuple[Bank, Adapter]] = []
    for bank in banks(model):
        parts = [(weight, adapter) for own, weight in weights.items() for adapter in bank.named(own)]
        if parts and all(isinstance(adapter, TokenRows) for _, adapter in parts):
            made.append((bank, _sum_of_rows(parts, shared)))
        elif parts:
            terms = _Terms(parts, bank.layout)
            a, b = terms.factors_of_sum(method, rank, pruned_sum)
            made.append((bank, Adapter(a, b, scaling=1.0, bias=terms.bias)))
    for bank, adapter in made:
        bank.add(name, adapter.train(bank.training))
    for owner, copies in copies_of(model).items():
        for own in [own for own in weights if own in copies]:
            attach_whole_(model.get_submodule(owner), name, copy.deepcopy(copies[own]))
    return use_adapter(model, name)


def _check_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Raises if the adapters cannot be summed, or the name of the sum is taken."""
    if not weights:
        raise LowRankError("combine_lora_: got no weights, expected a number for at least one adapter.")
    for each, weight in weights.items():
        check_name(model, each)
        if not is_number(weight) or not math.isfinite(weight):
            raise LowRankError(f"combine_lora_: got the weight {weight!r} for {each!r}, expected a finite number.")
    check_new_name(name, "combine_lora_")
    shared = trained_whole_by(model, weights)
    if shared is not None:
        raise LowRankError(
            f"combine_lora_: {shared[0]!r} is trained whole by each of the adapters {shared[1]}, and such copies do not"
            " add up; combine adapters of which at most one trains it."
        )
    if name in adapter_names(model):
        raise LowRankError(f"combine_lora_: there is an adapter {name!r} already; give another name.")
    for bank in banks(model):
        if any(adapter.magnitude is not None for each in weights for adapter in bank.named(each)):
            raise LowRankError("combine_lora_: DoRA's lengths do not add up; merge such adapters into the weight.")
        if any(isinstance(adapter, MixedGroups) for each in weights for adapter in bank.named(each)):
            raise LowRankError(
                "combine_lora_: an adapter lets each group of a convolution read the channels of all groups, which no"
                " sum of weights can hold; combine those that add_lora_ made."
            )


@dataclass(frozen=True)
class _Terms:
    """The adapters of one weight that are summed, each with its number, and the layout of the weight."""

    parts: list[tuple[float, Adapter]]
    layout: WeightLayout

    def factors_of_sum(self, method: str, rank: int | None, pruned_sum: PrunedSum) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of the sum.

        Args:
            method: one of :data:`Combination`.
            rank: rank of the result where it is approximated; ``None`` for the largest of the ranks.
            pruned_sum: how tensors are summed where factors or deltas are.
        """
        if method == "cat":
            return self._concatenated()
        if method == "svd":
            return _truncated(*self._concatenated(), self.layout, rank or self._largest_rank)
        weights, adapters = zip(*self.parts, strict=True)
        if method.endswith("_svd"):
            total = pruned_sum([adapter.delta(self.layout) for adapter in adapters], weights)
            return _best_factors(total, self.layout, rank or self._largest_rank)
        if any(adapter.a0 is not None for adapter in adapters):
            raise LowRankError(
                f"combine_lora_: {method!r} sums factors apart, which a frozen start forbids; use 'svd'."
            )
        if len({adapter.A.shape for adapter in adapters}) > 1:
            raise LowRankError(f"combine_lora_: {method!r} needs equal ranks; use 'svd' or 'cat'.")
        sizes = [weight * float(adapter.scaling) for weight, adapter in self.parts]
        roots = [abs(size) ** 0.5 for size in sizes]
        signed = [math.copysign(root, size) for root, size in zip(roots, sizes, strict=True)]
        a = pruned_sum([adapter.A for adapter in adapters], signed)
        b = pruned_sum([adapter.B for adapter in adapters], roots)
        return a, b

    @property
    def bias(self) -> Tensor | None:
        """The weighted sum of the adapters' biases, or ``None`` where they have none."""
        biases = [weight * adapter.bias for weight, adapter in self.parts if adapter.bias is not None]
        return torch.stack(biases).sum(0) if biases else None

    @property
    def _largest_rank(self) -> int:
        return max(len(self.layout.directions(adapter.A, adapter.B)[0]) for _, adapter in self.parts)

    def _concatenated(self) -> tuple[Tensor, Tensor]:
        """``[A_1; A_2; ...]`` and ``[s_1 B_1, s_2 B_2, ...]``, frozen starts with the opposite sign."""
        below, beside = [], []
        for weight, adapter in self.parts:
            size = weight * float(adapter.scaling)
            pairs: list[tuple[Tensor, Tensor]] = [(adapter.A, adapter.B * size)]
            if adapter.a0 is not None and adapter.b0 is not None:
                pairs.append((adapter.a0, adapter.b0 * -size))
            for pair in pairs:
                a, b = self.layout.directions(*pair)
                below.append(a)
                beside.append(b)
        a, b = self.layout.joined(torch.cat(below), torch.cat(beside))
        return a.contiguous(), b.contiguous()


def _truncated(a: Tensor, b: Tensor, layout: WeightLayout, rank: int) -> tuple[Tensor, Tensor]:
    """``B A = Q_b (R_b R_a^T) Q_a^T``: only the small core is decomposed."""
    rows, columns = _as_matrices(a, b, layout)
    right, left = torch.linalg.qr(rows.double().mT), torch.linalg.qr(columns.double())
    u, s, vh = exact_svd(left.R @ right.R.mT)
    root = s[..., None, :rank].sqrt()
    down, up = (right.Q @ vh.mT[..., :rank] * root).mT, left.Q @ u[..., :rank] * root
    return _in_layout(down.to(a), up.to(b), layout, layout.product(a.to("meta"), b.to("meta")))


def _best_factors(delta: Tensor, layout: WeightLayout, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of a formed delta."""
    u, s, vh = exact_svd(layout.matrix(delta).double())
    root = s[..., None, :rank].sqrt()
    return _in_layout((vh[..., :rank, :] * root.mT).to(delta), (u[..., :rank] * root).to(delta), layout, delta)


def _as_matrices(a: Tensor, b: Tensor, layout: WeightLayout) -> tuple[Tensor, Tensor]:
    """``[..., r, in]`` and ``[..., out, r]``: what ``layout.pair`` puts into the layout of ``A`` and ``B``."""
    if not isinstance(layout, Kernel):
        return a, b
    rows, columns = a.unflatten(0, (layout.groups, -1)), b.unflatten(0, (layout.groups, -1))
    return rows.flatten(2), columns.movedim(2, -1).flatten(1, -2)


def _in_layout(down: Tensor, up: Tensor, layout: WeightLayout, like: Tensor) -> tuple[Tensor, Tensor]:
    a, b = layout.pair(like, down, up)
    return a.contiguous(), b.contiguous()


def _sum_of_rows(parts: list[tuple[float, Adapter]], shared: dict[tuple[int, ...], TokenRows]) -> TokenRows:
    """The rows of all tokens that one of the adapters trains; tied layers share them."""
    given = [(weight, adapter) for weight, adapter in parts if isinstance(adapter, TokenRows)]
    key = tuple(id(adapter.rows) for _, adapter in given)
    first = given[0][1]
    if key not in shared:
        tokens = torch.cat([adapter.tokens for _, adapter in given]).unique()
        rows = first.rows.new_zeros(len(tokens), first.rows.shape[1])
        for weight, adapter in given:
            rows.index_add_(0, torch.searchsorted(tokens, adapter.tokens), weight * adapter.rows)
        shared[key] = TokenRows(nn.Parameter(rows), tokens, first.size, head=first.head)
    made = shared[key]
    return TokenRows(made.rows, made.tokens, first.size, head=first.head)
