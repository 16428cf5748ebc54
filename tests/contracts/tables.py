"""One row for every layer, decomposition and rule. A new one is one more row here and inherits every check.

The tests ask the rows, never the classes: what differs from one layer to the next stands in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor, nn

import lowrank_layers as lr

DERANDOMIZED = settings(deadline=None, derandomize=True, max_examples=40)
"""What every hypothesis test of this folder runs under."""

HALVES = [torch.bfloat16, torch.float16]
"""The short dtypes and what a product of a few of their roundings may be off by."""
HALF_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}

BAD_RANKS = [0, -1, True, 2.5, "a"]


def relative(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in fp64; the shapes must agree."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class LayerRow:
    """A factored layer.

    Args:
        cls: the class.
        variants: constructor keywords of the dense layer, by name; ``"plain"`` is the one with torch's defaults.
        wide: keywords of a larger layer, for statistics, and the rank it gets.
        sample: from a dense layer and a leading shape (``()`` is unbatched) to an input.
        sample_shape: from a dense layer to the shape of one sample, as ``layer_cost`` takes it.
        full: from a dense layer to the rank at which nothing is lost.
        small: a rank at which something is lost, for the sizes in ``variants``.
        excess: a rank above every dimension.
        matrix: the unfolding whose Eckart-Young tail is the error at ``small``; ``None`` where there is no such law.
        smoke: the variants for slow checks.
        channels_last: whether inputs have a memory format.
        form: what ``from_dense`` and the constructor take besides the rank.
        unbatched: whether one sample without a batch is an input.
        again: whether ``from_dense`` of its own dense form gives the layer back; not where the digits of a small
            embedding leave too few rows to tell the train from.
    """

    cls: type[lr.FactoredModule]
    variants: Mapping[str, dict[str, Any]]
    wide: tuple[dict[str, Any], Any]
    sample: Callable[[nn.Module, tuple[int, ...]], Tensor]
    sample_shape: Callable[[nn.Module], tuple[int, ...]]
    full: Callable[[Any], Any]
    small: Any
    excess: Any
    matrix: Callable[[Tensor], Tensor] | None = None
    smoke: tuple[str, ...] = ("plain", "no bias")
    channels_last: bool = False
    form: Mapping[str, Any] = field(default_factory=dict)
    unbatched: bool = True
    again: bool = True

    @property
    def name(self) -> str:
        return "-".join([self.cls.__name__, *self.form.values()])

    def dense(self, variant: str = "plain", **more: Any) -> nn.Module:
        """The torch layer of a variant."""
        return self.cls.dense_type(**{**self.variants[variant], **more})

    def fresh(self, variant: str = "plain", rank: Any = None, **more: Any) -> lr.FactoredModule:
        """The factored layer of a variant by its constructor: the dense one's keywords and a rank."""
        settings = {**self.variants[variant], **self.form, **more}
        return self.cls(**settings, rank=self.small if rank is None else rank)

    def from_dense(self, dense: nn.Module, rank: Any) -> lr.FactoredModule:
        return self.cls.from_dense(dense, rank=rank, **self.form)

    def full_rank(self, dense: nn.Module) -> Any:
        return self.full(dense)

    def input(self, dense: nn.Module, batch: int | None = 2) -> Tensor:
        """A batch (``None``: one unbatched sample) in the dtype of the layer."""
        x = self.sample(dense, () if batch is None else (batch,))
        return x.to(dense.weight.dtype) if x.is_floating_point() else x


LINEAR_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"in_features": 6, "out_features": 5},
    "no bias": {"in_features": 6, "out_features": 5, "bias": False},
    "wide": {"in_features": 5, "out_features": 7},
    "prime": {"in_features": 13, "out_features": 11},
    "one output": {"in_features": 6, "out_features": 1},
}

_CONV: dict[str, Any] = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}

CONV_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": _CONV,
    "no bias": {**_CONV, "bias": False},
    "stride": {**_CONV, "stride": 2},
    "stride (2, 1)": {**_CONV, "stride": (2, 1)},
    "padding": {**_CONV, "padding": 2},
    "padding (0, 2)": {**_CONV, "padding": (0, 2)},
    "same": {**_CONV, "padding": "same"},
    "same, even kernel": {**_CONV, "kernel_size": (4, 2), "padding": "same"},
    "same, even kernel, dilation": {**_CONV, "kernel_size": (2, 4), "padding": "same", "dilation": (3, 2)},
    "same, even kernel, dilation, reflect": {
        **_CONV,
        "kernel_size": (2, 4),
        "padding": "same",
        "dilation": (3, 1),
        "padding_mode": "reflect",
    },
    "valid": {**_CONV, "padding": "valid", "dilation": 2},
    "zeros": {**_CONV, "padding": (2, 1), "padding_mode": "zeros"},
    "reflect": {**_CONV, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {**_CONV, "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {**_CONV, "padding": (2, 1), "padding_mode": "circular"},
    "reflect, stride": {**_CONV, "padding": (1, 2), "stride": (1, 2), "padding_mode": "reflect"},
    "same, circular": {**_CONV, "padding": "same", "dilation": 2, "padding_mode": "circular"},
    "dilation": {**_CONV, "dilation": (2, 3)},
    "kernel (3, 1)": {**_CONV, "kernel_size": (3, 1), "padding": (1, 0)},
    "kernel 1": {**_CONV, "kernel_size": 1},
    "prime": {"in_channels": 5, "out_channels": 7, "kernel_size": 3},
    "one channel": {"in_channels": 1, "out_channels": 3, "kernel_size": 3},
    "groups": {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2},
    "depthwise": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise, twice the channels": {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "groups": 3},
    "everything": {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
        "bias": False,
        "padding_mode": "replicate",
    },
}

_LINE: dict[str, Any] = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}

CONV1D_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": _LINE,
    "no bias": {**_LINE, "bias": False},
    "same, even kernel, dilation": {**_LINE, "kernel_size": 4, "padding": "same", "dilation": 2},
    "circular": {**_LINE, "padding": 2, "padding_mode": "circular"},
    "kernel 1, stride": {**_LINE, "kernel_size": 1, "stride": 2},
    "prime": {"in_channels": 5, "out_channels": 7, "kernel_size": 3},
    "depthwise": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4},
    "everything": {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": 3,
        "stride": 2,
        "padding": 2,
        "dilation": 2,
        "groups": 2,
        "bias": False,
        "padding_mode": "reflect",
    },
}

CONV3D_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"in_channels": 3, "out_channels": 4, "kernel_size": 2},
    "no bias": {"in_channels": 3, "out_channels": 4, "kernel_size": (1, 2, 3), "bias": False},
    "same": {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "same"},
    "kernel (1, 1, 3)": {"in_channels": 3, "out_channels": 4, "kernel_size": (1, 1, 3)},
    "prime": {"in_channels": 5, "out_channels": 7, "kernel_size": 2},
    "depthwise": {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 4},
    "everything": {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": (3, 2, 1),
        "stride": (2, 1, 2),
        "padding": (2, 1, 0),
        "dilation": (1, 2, 1),
        "groups": 2,
        "bias": False,
        "padding_mode": "replicate",
    },
}


def _transposed(dims: int) -> dict[str, dict[str, Any]]:
    plain = {"in_channels": 4, "out_channels": 3, "kernel_size": 3 if dims < 3 else 2}
    return {
        "plain": plain,
        "no bias": {**plain, "bias": False},
        "stride, output_padding": {**plain, "stride": 2, "padding": 1, "output_padding": 1},
        "stride beyond the kernel": {**plain, "stride": 4},
        "prime": {"in_channels": 5, "out_channels": 7, "kernel_size": 3 if dims < 3 else 2},
        "depthwise": {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "groups": 4},
        "everything": {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (2, 3, 2)[:dims],
            "stride": (2, 1, 2)[:dims],
            "padding": (1, 1, 0)[:dims],
            "output_padding": (1, 0, 1)[:dims],
            "dilation": (1, 2, 1)[:dims],
            "groups": 2,
            "bias": False,
        },
    }


EMBEDDING_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_embeddings": 9, "embedding_dim": 6},
    "padding_idx": {"num_embeddings": 9, "embedding_dim": 6, "padding_idx": 2},
    "padding_idx from the end": {"num_embeddings": 9, "embedding_dim": 6, "padding_idx": -1},
    "max_norm": {"num_embeddings": 9, "embedding_dim": 6, "max_norm": 1.5},
    "max_norm, norm_type": {"num_embeddings": 9, "embedding_dim": 6, "max_norm": 3.0, "norm_type": 1.0},
    "scale_grad_by_freq": {"num_embeddings": 9, "embedding_dim": 6, "scale_grad_by_freq": True},
    "sparse": {"num_embeddings": 9, "embedding_dim": 6, "sparse": True},
    "prime": {"num_embeddings": 5, "embedding_dim": 11},
}

TENSORIZED_VARIANTS: dict[str, dict[str, Any]] = {
    **{name: EMBEDDING_VARIANTS[name] for name in ("plain", "padding_idx", "padding_idx from the end", "prime")},
    "exact digits": {"num_embeddings": 12, "embedding_dim": 8},
    "one column": {"num_embeddings": 30, "embedding_dim": 1},
}

BAG_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_embeddings": 9, "embedding_dim": 6},
    "sum": {"num_embeddings": 9, "embedding_dim": 6, "mode": "sum"},
    "padding_idx": {"num_embeddings": 9, "embedding_dim": 6, "padding_idx": 2},
    "max_norm": {"num_embeddings": 9, "embedding_dim": 6, "max_norm": 1.5},
    "sparse, sum": {"num_embeddings": 9, "embedding_dim": 6, "sparse": True, "mode": "sum"},
    "prime": {"num_embeddings": 5, "embedding_dim": 11},
}

_SIZES = {1: (12,), 2: (9, 8), 3: (5, 6, 4)}


def _image(conv: nn.Module, lead: tuple[int, ...]) -> Tensor:
    return torch.randn(*lead, *_image_shape(conv))


def _image_shape(conv: nn.Module) -> tuple[int, ...]:
    return conv.in_channels, *_SIZES[len(conv.kernel_size)]


def group_shape(conv: nn.Module) -> tuple[int, ...]:
    """The kernel of one group: out, in, and its own axes."""
    return conv.out_channels // conv.groups, conv.in_channels // conv.groups, *conv.kernel_size


def _channel_limit(conv: nn.Module) -> int:
    out, into, *k = group_shape(conv)
    area = math.prod(k)
    return min(into, out * area) if conv.transposed else min(out, into * area)


def _spatial_limit(conv: nn.Module) -> int:
    out, into, height, width = group_shape(conv)
    return min(out * width, into * height)


def _tucker_limits(conv: nn.Module) -> tuple[int, ...]:
    shape = group_shape(conv)
    return tuple(min(shape[k], math.prod(shape) // shape[k]) for k in (0, 1))


def _cp_limit(conv: nn.Module) -> int:
    return math.prod(group_shape(conv)) // max(group_shape(conv))


def _conv_rows(dims: int, *, transposed: bool) -> list[LayerRow]:
    """Channel SVD, Tucker and CP of one kind of convolution."""
    kind = f"Conv{'Transpose' if transposed else ''}{dims}d"
    variants = {1: CONV1D_VARIANTS, 2: CONV_VARIANTS, 3: CONV3D_VARIANTS}[dims]
    channels = {1: (40, 48), 2: (24, 32), 3: (24, 32)}[dims]
    wide = {"in_channels": channels[0], "out_channels": channels[1], "kernel_size": 3 if dims < 3 else 2}
    common: dict[str, Any] = {
        "variants": _transposed(dims) if transposed else variants,
        "sample": _image,
        "sample_shape": _image_shape,
        "smoke": ("plain", "everything", *(["same, circular"] if kind == "Conv2d" else [])),
        "channels_last": dims == 2,
        "excess": 1000,
    }
    pair, tucker, cp = (getattr(lr, f"{family}{kind}") for family in ("LowRank", "Tucker", "CP"))
    return [
        LayerRow(
            pair,
            wide=(wide, 12),
            full=_channel_limit,
            small=2,
            matrix=lambda weight: weight.flatten(1),
            **common,
        ),
        LayerRow(
            tucker, wide=(wide, (14, 10)), full=_tucker_limits, small=(2, 2), **{**common, "excess": (1000, 1000)}
        ),
        LayerRow(cp, wide=(wide, 24), full=_cp_limit, small=2, **common),
    ]


def _bond_limits(table: nn.Module) -> tuple[int, ...]:
    """The smaller side of each unfolding."""
    sizes = [n * d for n, d in zip(*lr.TensorizedEmbedding.like(table, rank=1).split, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def _as_spatial(weight: Tensor) -> Tensor:
    out, into, height, width = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(out * width, into * height)


LAYERS = [
    LayerRow(
        lr.LowRankLinear,
        LINEAR_VARIANTS,
        wide=({"in_features": 64, "out_features": 96}, 24),
        sample=lambda linear, lead: torch.randn(*lead, linear.in_features),
        sample_shape=lambda linear: (linear.in_features,),
        full=lambda linear: min(linear.weight.shape),
        small=2,
        excess=1000,
        matrix=lambda weight: weight,
    ),
    *(row for dims in (1, 2, 3) for transposed in (False, True) for row in _conv_rows(dims, transposed=transposed)),
    LayerRow(
        lr.LowRankConv2d,
        CONV_VARIANTS,
        wide=({"in_channels": 24, "out_channels": 32, "kernel_size": 3}, 20),
        sample=_image,
        sample_shape=_image_shape,
        full=_spatial_limit,
        small=2,
        excess=1000,
        matrix=_as_spatial,
        smoke=("plain", "everything"),
        channels_last=True,
        form={"mode": "spatial"},
    ),
    LayerRow(
        lr.LowRankEmbedding,
        EMBEDDING_VARIANTS,
        wide=({"num_embeddings": 96, "embedding_dim": 64}, 24),
        sample=lambda table, lead: torch.randint(table.num_embeddings, (*lead, 7)),
        sample_shape=lambda table: (7,),
        full=lambda table: min(table.weight.shape),
        small=2,
        excess=1000,
        matrix=lambda weight: weight,
        smoke=("plain", "padding_idx", "max_norm"),
    ),
    LayerRow(
        lr.LowRankEmbeddingBag,
        BAG_VARIANTS,
        wide=({"num_embeddings": 96, "embedding_dim": 64}, 24),
        sample=lambda table, lead: torch.randint(table.num_embeddings, (*lead, 7)),
        sample_shape=lambda table: (7,),
        full=lambda table: min(table.weight.shape),
        small=2,
        excess=1000,
        matrix=lambda weight: weight,
        smoke=("plain", "sum"),
        unbatched=False,
    ),
    LayerRow(
        lr.TensorizedEmbedding,
        TENSORIZED_VARIANTS,
        wide=({"num_embeddings": 96, "embedding_dim": 64}, (12, 10)),
        sample=lambda table, lead: torch.randint(table.num_embeddings, (*lead, 7)),
        sample_shape=lambda table: (7,),
        full=_bond_limits,
        small=(2, 2),
        excess=1000,
        smoke=("plain", "padding_idx"),
        again=False,
    ),
]


# -------------------------------------------------------------------------------------------- decompositions


@dataclass(frozen=True)
class DecompositionRow:
    """A decomposition.

    Args:
        name: of the row.
        function: the public function, whose name must open every refusal.
        keywords: what the row fixes.
        shape: of a sample.
        per_mode: whether it takes one rank a mode.
        full: from a shape to the rank at which nothing is lost.
        exact: the relative error at full rank that is allowed in fp64.
        orthonormal: from a factorization to the matrices whose columns are orthonormal.
        nonnegative: whether it takes no entry below zero.
    """

    name: str
    function: Callable[..., Any]
    keywords: dict[str, Any]
    shape: tuple[int, ...]
    per_mode: bool
    full: Callable[[tuple[int, ...]], Any]
    exact: float
    orthonormal: Callable[[Any], list[Tensor]]
    nonnegative: bool = False
    sparse: bool = False

    def sample(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """A random tensor that it takes."""
        tensor = torch.randn(*self.shape, generator=generator(seed), dtype=torch.float64).to(dtype)
        return tensor.abs() if self.nonnegative else tensor

    def __call__(self, tensor: Tensor, rank: Any) -> Any:
        return self.function(tensor, rank, **self.keywords)

    def rank(self, each: Any, ndim: int | None = None) -> Any:
        """``each`` as this decomposition's rank argument."""
        return (each,) * (len(self.shape) if ndim is None else ndim) if self.per_mode else each


def _svd_row(method: str) -> DecompositionRow:
    return DecompositionRow(
        f"svd {method}", lr.svd, {"method": method}, (12, 9), False, min, 1e-13, lambda f: [f.u, f.vh.mT], sparse=True
    )


def _tucker_row(name: str, **keywords: Any) -> DecompositionRow:
    def factors(f: lr.Tucker) -> list[Tensor]:
        return [factor for factor in f.factors if factor is not None]

    return DecompositionRow(name, lr.tucker, keywords, (6, 5, 3, 3), True, tuple, 1e-13, factors)


def _nmf_row(solver: str, loss: str) -> DecompositionRow:
    # the start without zeros filled in is exact for a constant, which multiplicative updates only approach
    keywords = {"solver": solver, "loss": loss, "init": "nndsvd"}
    return DecompositionRow(
        f"nmf {solver} {loss}",
        lr.nmf,
        keywords,
        (12, 9),
        False,
        min,
        1e-13,
        lambda f: [],
        nonnegative=True,
        sparse=True,
    )


SVD_METHODS = ["exact", "gram", "randomized", "krylov", "auto"]

DECOMPOSITIONS = [
    *map(_svd_row, SVD_METHODS),
    _tucker_row("hooi"),
    _tucker_row("hosvd", sweeps=0),
    DecompositionRow(
        "cp", lr.cp, {}, (5, 4, 3), False, lambda shape: math.prod(shape) // max(shape), 1e-6, lambda f: []
    ),
    _nmf_row("hals", "frobenius"),
    _nmf_row("mu", "frobenius"),
    _nmf_row("mu", "kl"),
]


# ----------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class RuleRow:
    """A rank rule that reads singular values.

    Args:
        rule: an instance.
        reference: its formula in plain numpy, from the values (descending, fp64) and the matrix' shape.
        noiseless: whether it finds the exact rank of a matrix with a little noise.
    """

    rule: Callable[[lr.Spectrum], int]
    reference: Callable[[np.ndarray, tuple[int, int]], int]
    noiseless: bool = False

    @property
    def name(self) -> str:
        return str(self.rule)


def _energy(fraction: float) -> Callable[[np.ndarray, tuple[int, int]], int]:
    def reference(s: np.ndarray, shape: tuple[int, int]) -> int:
        kept = np.cumsum(s**2)
        return next(r + 1 for r, k in enumerate(kept) if k >= fraction * kept[-1])

    return reference


def _relative_error(bound: float) -> Callable[[np.ndarray, tuple[int, int]], int]:
    def reference(s: np.ndarray, shape: tuple[int, int]) -> int:
        total = np.linalg.norm(s)
        return next(r for r in range(1, len(s) + 1) if np.linalg.norm(s[r:]) <= bound * total)

    return reference


def _gavish_donoho(s: np.ndarray, shape: tuple[int, int]) -> int:
    b = min(shape) / max(shape)
    return max(1, int((s > (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * np.median(s)).sum()))


def _elbow(s: np.ndarray, shape: tuple[int, int]) -> int:
    """What stands before the value furthest below the chord: that one already belongs to the floor."""
    chord = np.linspace(s[0], s[-1], len(s))
    return max(1, int(np.argmax(chord - s)))


def _evbmf(s: np.ndarray, shape: tuple[int, int]) -> int:
    """Nakajima et al., JMLR 2013, with the free energy minimised on a fine grid."""
    rows, columns = sorted(shape)
    alpha = rows / columns
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    first = min(math.ceil(rows / (1 + alpha)) - 1, len(s)) - 1 + 1
    highest = (s**2).sum() / (rows * columns)
    lowest = max(s[first] ** 2 / (columns * x_bar), (s[first:] ** 2).mean() / columns)

    def free_energy(variance: float) -> float:
        x = s**2 / (columns * variance)
        above, below = x[x > x_bar], x[x <= x_bar]
        tau = 0.5 * (above - (1 + alpha) + np.sqrt((above - (1 + alpha)) ** 2 - 4 * alpha))
        return float(
            (below - np.log(below)).sum()
            + (above - tau).sum()
            + np.log((tau + 1) / above).sum()
            + alpha * np.log(tau / alpha + 1).sum()
        )

    variance = min(np.geomspace(lowest, highest, 4000), key=free_energy)
    return max(1, int((s > math.sqrt(columns * variance * x_bar)).sum()))


RULES = [
    RuleRow(lr.Energy(0.5), _energy(0.5)),
    RuleRow(lr.Energy(0.9), _energy(0.9)),
    RuleRow(lr.Energy(0.99), _energy(0.99)),
    RuleRow(lr.RelativeError(0.05), _relative_error(0.05)),
    RuleRow(lr.RelativeError(0.4), _relative_error(0.4)),
    RuleRow(lr.EVBMF(), _evbmf, noiseless=True),
    RuleRow(lr.GavishDonoho(), _gavish_donoho, noiseless=True),
    RuleRow(lr.Elbow(), _elbow, noiseless=True),
]


def spectrum(matrix: Tensor) -> lr.Spectrum:
    """What a layer shows to a rule for this matrix."""
    return spectrum_of(torch.linalg.svdvals(matrix.double()), tuple(matrix.shape))


def spectrum_of(values: Tensor | None, shape: tuple[int, int]) -> lr.Spectrum:
    rows, columns = shape
    step = rows + columns
    return lr.Spectrum(values, shape, range(step, step * min(shape) + 1, step), rows * columns, "test")
