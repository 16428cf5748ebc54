"""Layers in int8: what they cost, what their rounding adds to the loss, and how they are built."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import Cost
from ..errors import LowRankError
from ..layers import (
    FactoredModule,
    Int8Layer,
    LowRankEmbedding,
    LowRankLinear,
    PivotLinear,
    bias_of,
    int8_for,
    is_embedding,
    matrices_of,
    meta_twin,
    round_factors_,
    weight_from_matrices,
    weight_of,
)
from ..layers.conversion import fill
from .candidates import Candidate
from .method import Method, Option, factored_like, layer_for, quadratic
from .methods.pivot import PivotMethod
from .methods.svd import SVDMethod
from .regression import joint_bias

RANKS = 8
"""Ranks, at most, at which the factors of a layer are rounded to know what that adds to the loss."""


def check_bits(bits: object) -> None:
    """Raises for bits that no layer can be stored with."""
    if bits is not None and (isinstance(bits, bool) or bits != 8):
        raise LowRankError(f"got bits={bits!r}, expected 8 (int8), or None for floating point.")


def int8_like(dense: nn.Module, *, bias: bool) -> Int8Layer:
    """Returns an uninitialized layer in int8 in the place of a dense one.

    Args:
        dense: the dense layer.
        bias: whether the new one has a bias.

    Raises:
        LowRankError: if there is no such layer.
    """
    kind = int8_for(dense)
    if kind is None:
        raise LowRankError(
            f"got a {type(dense).__name__}, expected nn.Linear, or nn.Embedding without max_norm, which can be stored"
            " in int8; leave this one in floating point."
        )
    return kind.like(dense, bias=bias)


def int8_options(
    layer: Candidate, offers: Iterable[tuple[Method | None, Option]]
) -> Iterator[tuple[Method | None, Option]]:
    """Yields what a layer can be in int8: whole, and by a pair of factors at every rank.

    The loss is the weighted error of the rounded weights. It is exact for the whole weight and at 8 ranks; between
    them, what rounding adds is interpolated. Each rank is offered by the method that takes fewer bytes: with exact
    factors all lose the same.

    Args:
        layer: the dense layer.
        offers: its options in floating point; no method stands for the dense layer.
    """
    module = layer.module
    if int8_for(module) is not None:
        new, dense = int8_like(meta_twin(module), bias=layer.has_bias), _single(module)
        rounded = int8_like(dense, bias=False).fill_(weight_of(dense))
        loss = layer.problems[0].loss(matrices_of(rounded)[0])
        yield None, Option(None, layer.cost_model.cost(new, layer.stats), loss, bits=8)
    exact: dict[int, float] = {}
    ranks: dict[Method, list[int]] = {}
    for method, option in offers:
        if isinstance(method, (SVDMethod, PivotMethod)) and _can_round(method, module):
            exact[option.rank] = option.loss_increase
            ranks.setdefault(method, []).append(option.rank)
    best: dict[int, tuple[Method, Cost]] = {}
    for method, own in ranks.items():
        costs = quadratic(partial(_int8_cost, method, layer), own, layer.cost_model.affine)
        for rank, cost in zip(own, costs, strict=True):
            if rank not in best or cost.bytes < best[rank][1].bytes:
                best[rank] = method, cost
    added = _added_by_rounding(layer, {rank: method for rank, (method, _) in sorted(best.items())}, exact)
    for rank, more in added.items():
        method, cost = best[rank]
        yield method, Option(rank, cost, exact[rank] + more, bits=8)


def build_int8(layer: Candidate, method: Method | None, rank: Any) -> FactoredModule | Int8Layer:
    """Returns the layer with weights, or factors, in int8; its bias makes up for the mean of what rounding changes.

    Args:
        layer: the dense layer.
        method: how it is factored; ``None`` for the whole weight.
        rank: a rank of the method.
    """
    dense = layer.module
    exact = replace(layer, module=_single(dense))
    new: FactoredModule | Int8Layer
    if method is None:
        new = int8_like(exact.module, bias=layer.has_bias)
        new.fill_(weight_from_matrices(dense, torch.stack([problem.full for problem in exact.problems])))
    else:
        new = round_factors_(method.build(exact, rank))
    own = bias_of(new)
    if own is not None:
        bias = joint_bias(exact.problems, list(matrices_of(new.to_dense()).double()))
        with torch.no_grad():
            own.zero_() if bias is None else own.copy_(bias)
    return new.to(weight_of(dense).dtype)


def _single(module: nn.Module) -> nn.Module:
    """The layer, or a copy in fp32 of one in 16 bits, from which it is rounded once and not twice."""
    return copy.deepcopy(module).float() if weight_of(module).dtype.itemsize < 4 else module


def _can_round(method: Method, module: nn.Module) -> bool:
    """Whether the factors of a method's layer can be stored in int8."""
    kind = layer_for(method, module)
    plain = getattr(module, "max_norm", None) is None
    return plain and kind is not None and issubclass(kind, (LowRankLinear, LowRankEmbedding))


def _added_by_rounding(layer: Candidate, methods: Mapping[int, Method], exact: Mapping[int, float]) -> dict[int, float]:
    """What rounding the factors adds to the loss at every rank, in rising order.

    Args:
        layer: the dense layer.
        methods: the method of each rank, in rising order.
        exact: the loss at each rank without rounding.
    """
    ranks = list(methods)
    if not ranks:
        return {}
    tried = sorted({ranks[round((len(ranks) - 1) * k / (RANKS - 1))] for k in range(RANKS)})
    problem = layer.problems[0]
    up, down = problem.pair(ranks[-1])
    known = []
    for rank in tried:
        factors = _rounded_factors(methods[rank], layer.module, up[:, :rank], down[:rank])
        known.append(max(0.0, problem.loss_of_pair(*factors) - exact[rank]))
    found = {}
    for rank in ranks:
        after = bisect_left(tried, rank)
        if tried[after] == rank:
            found[rank] = known[after]
            continue
        before = after - 1
        share = (rank - tried[before]) / (tried[after] - tried[before])
        found[rank] = (1 - share) * known[before] + share * known[after]
    return found


def _int8_cost(method: Method, layer: Candidate, rank: int) -> Cost:
    twin = factored_like(method, meta_twin(layer.module), rank, layer.has_bias)
    return layer.cost_model.cost(round_factors_(twin, filled=False), layer.stats)


def _rounded_factors(method: Method, module: nn.Module, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors ``[out, r]`` and ``[r, in]`` of the layer's matrix, rounded as they will be stored."""
    kind, dense = layer_for(method, module), _single(module)
    if is_embedding(module):
        assert kind is not None
        assert issubclass(kind, LowRankEmbedding)
        pair = round_factors_(kind.from_pair(dense, down.mT, up))
        first, last = (weight_of(part) for part in pair.parts)
        return last, first.mT
    assert kind is not None
    assert issubclass(kind, LowRankLinear)
    if issubclass(kind, PivotLinear):
        pivot = kind.from_pair(dense, up, down, None)
        round_factors_(pivot)
        return weight_of(pivot.up), pivot.basis
    linear = round_factors_(fill(kind.like(dense, rank=len(down), bias=False), [down, up], None))
    first, last = (weight_of(part) for part in linear.parts)
    return last, first
