"""Convolutions of every kind that torch takes, drawn at random: at full rank nothing is lost, whatever the settings.

A configuration is valid by construction: what one setting permits decides what the next one is drawn from.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import lowrank_layers as lr

from ..contracts.tables import DERANDOMIZED, HALF_TOLERANCE, relative

MORE = 10_000
"""Above every rank that the layers of this file have."""

EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}

FAMILIES = ["LowRank", "spatial", "Tucker", "CP"]
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def examples(count: int) -> settings:
    return settings(DERANDOMIZED, max_examples=count)


@dataclass(frozen=True)
class Case:
    """A convolution, and an input that it takes.

    Args:
        kind: name of the class in torch.nn.
        kwargs: arguments of its constructor.
        size: size of the input along each axis.
        batch: batch size of the input; ``None`` is unbatched.
        seed: seed of weights and input.
    """

    kind: str
    kwargs: dict[str, Any]
    size: tuple[int, ...]
    batch: int | None
    seed: int

    def conv(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(self.seed)
        return getattr(nn, self.kind)(**self.kwargs, dtype=torch.float64).to(dtype)

    def input(self, dtype: torch.dtype) -> Tensor:
        lead = () if self.batch is None else (self.batch,)
        return torch.randn(*lead, self.kwargs["in_channels"], *self.size, dtype=torch.float64).to(dtype)


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    dims = 2 if family == "spatial" else draw(st.integers(1, 3))
    transposed = family != "spatial" and draw(st.booleans())
    groups, in_each, out_each = draw(channels())
    kernel = per_axis(draw, dims, 1, 3)
    dilation = per_axis(draw, dims, 1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    kwargs: dict[str, Any] = {
        "in_channels": groups * in_each,
        "out_channels": groups * out_each,
        "kernel_size": one_or_all(draw, kernel),
        "dilation": one_or_all(draw, dilation),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    named = None if transposed else draw(st.sampled_from([None, None, "same", "valid"]))
    stride = [1] * dims if named == "same" else per_axis(draw, dims, 1, 3)
    padding = [0] * dims if named else per_axis(draw, dims, 0, 2)
    kwargs |= {"stride": one_or_all(draw, stride), "padding": named or one_or_all(draw, padding)}
    if transposed:
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        kwargs["output_padding"] = one_or_all(draw, extra)
        # the shortest input whose output is not empty
        lack = [2 * p - r - e for p, r, e in zip(padding, reach, extra, strict=True)]
        least = [1 + max(0, -(-short // s)) for short, s in zip(lack, stride, strict=True)]
    else:
        kwargs["padding_mode"] = draw(st.sampled_from(PADDING_MODES))
        # the kernel fits, and reflect finds enough to mirror
        least = [1 + max(r, p) for r, p in zip(reach, padding, strict=True)]
    size = tuple(n + draw(st.integers(0, 2)) for n in least)
    kind = f"Conv{'Transpose' if transposed else ''}{dims}d"
    return Case(kind, kwargs, size, draw(st.sampled_from([None, 1, 2])), draw(st.integers(0, 999)))


@st.composite
def channels(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draws groups and channels per group: a plain, a grouped, or a depthwise convolution with a multiplier."""
    return draw(
        st.one_of(
            st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5)),
            st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(1, 3)),
            st.tuples(st.integers(2, 5), st.just(1), st.integers(1, 3)),
        )
    )


def per_axis(draw: st.DrawFn, dims: int, low: int, high: int) -> list[int]:
    return [draw(st.integers(low, high)) for _ in range(dims)]


def one_or_all(draw: st.DrawFn, values: list[int]) -> int | tuple[int, ...]:
    """One number for all axes where they are equal, which torch takes as well, or one per axis."""
    alike = len(set(values)) == 1
    return values[0] if alike and draw(st.booleans()) else tuple(values)


def factored(family: str, conv: nn.Module, rank: int = MORE) -> lr.FactoredModule:
    if family == "spatial":
        return lr.LowRankConv2d.from_dense(conv, rank=rank, mode="spatial")
    return getattr(lr, f"{family}{type(conv).__name__}").from_dense(conv, rank=rank)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float(torch.linalg.vector_norm((a - b).detach().double()))


@torch.no_grad()
def sum_of_sizes(conv: nn.Module, x: Tensor) -> float:
    """The norm of the outputs if no terms cancelled: the scale of rounding errors."""
    positive = copy.deepcopy(conv).double()
    for parameter in positive.parameters():
        parameter.abs_()
    return float(torch.linalg.vector_norm(positive(x.double().abs())))


def check(family: str, case: Case, dtype: torch.dtype, bound: float) -> None:
    conv, x = case.conv(dtype), case.input(dtype)
    expected = conv(x)
    layer = factored(family, conv)
    got = layer(x)
    dense = layer.to_dense()
    assert type(dense) is type(conv)
    assert repr(dense) == repr(conv)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert got.dtype == dtype
    assert relative(layer.weight, conv.weight) < bound
    assert torch.equal(dense.weight, layer.weight)
    assert (dense.bias is None) == (conv.bias is None)
    assert conv.bias is None or torch.equal(dense.bias, conv.bias)
    scale = sum_of_sizes(conv, x)
    assert distance(got, expected) <= bound * scale
    assert distance(dense(x), expected) <= bound * scale
    small = factored(family, conv, rank=1)
    back = small.to_dense()
    assert distance(small(x), back(x)) <= bound * sum_of_sizes(back, x)


families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_at_full_rank_it_computes_what_the_dense_layer_computes(family):
    @examples(100)
    @given(cases(family))
    def every(case: Case) -> None:
        check(family, case, torch.float32, EXACT[torch.float32])

    every()


@families
def test_at_full_rank_it_computes_the_same_in_float64(family):
    @examples(40)
    @given(cases(family))
    def every(case: Case) -> None:
        check(family, case, torch.float64, EXACT[torch.float64])

    every()


@families
@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision_sources_are_met_to_their_precision(family, dtype):
    @examples(20)
    @given(cases(family))
    def every(case: Case) -> None:
        check(family, case, dtype, HALF_TOLERANCE[dtype])

    every()
