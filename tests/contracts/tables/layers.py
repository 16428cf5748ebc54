"""One row per factored layer; a new layer is one more row in ``LAYERS``, and inherits every check of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_layers as lr

from .layer_variants import (
    BAG_VARIANTS,
    CONV1D_VARIANTS,
    CONV3D_VARIANTS,
    CONV_VARIANTS,
    EMBEDDING_VARIANTS,
    LINEAR_VARIANTS,
    TENSORIZED_VARIANTS,
    transposed_variants,
)


@dataclass(frozen=True)
class LayerRow:
    """A factored layer.

    Args:
        cls: class of the layer.
        variants: constructor keywords of the dense layer, by name.
        wide: keywords of a larger layer, for statistics, and its rank.
        sample: makes an input for a dense layer, given a leading shape (``()`` is unbatched).
        sample_shape: shape of one sample for a dense layer, as ``layer_cost`` takes it.
        full: rank at which nothing is lost, for a dense layer.
        small: a rank at which something is lost, for the sizes in ``variants``.
        excess: a rank above every dimension.
        matrix: unfolds the weight to the matrix whose Eckart-Young tail is the error; ``None`` where none is.
        smoke: names of the variants for slow checks.
        channels_last: whether inputs have a memory format.
        form: keywords of ``from_dense`` and the constructor besides the rank.
        unbatched: whether one sample without a batch is a valid input.
        again: whether ``from_dense`` of its dense form gives the layer back; not where the digits of a small embedding
            leave too few complete rows to recover the train from.
        balanced: whether each factor of a pair has half of the singular values.
        buffers: names of its buffers, of integers.
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
    balanced: bool = True
    buffers: tuple[str, ...] = ()

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
    """Channel SVD, its pivot form, Tucker and CP of one kind of convolution."""
    kind = f"Conv{'Transpose' if transposed else ''}{dims}d"
    variants = {1: CONV1D_VARIANTS, 2: CONV_VARIANTS, 3: CONV3D_VARIANTS}[dims]
    channels = {1: (40, 48), 2: (24, 32), 3: (24, 32)}[dims]
    wide = {"in_channels": channels[0], "out_channels": channels[1], "kernel_size": 3 if dims < 3 else 2}
    common: dict[str, Any] = {
        "variants": transposed_variants(dims) if transposed else variants,
        "sample": _image,
        "sample_shape": _image_shape,
        "smoke": ("plain", "everything", *(["same, circular"] if kind == "Conv2d" else [])),
        "channels_last": dims == 2,
        "excess": 1000,
    }
    pair, tucker, cp = (getattr(lr, f"{family}{kind}") for family in ("LowRank", "Tucker", "CP"))
    pivots = [] if transposed else [getattr(lr, f"Pivot{kind}")]
    return [
        *(
            LayerRow(
                pivot,
                wide=(wide, 12),
                full=_channel_limit,
                small=2,
                matrix=lambda weight: weight.flatten(1),
                balanced=False,
                buffers=("position",),
                # at rank 2 nothing is left for ``up`` in the groups of "everything"
                **{**common, "smoke": ("plain", "no bias", *(["same, circular"] if kind == "Conv2d" else []))},
            )
            for pivot in pivots
        ),
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


def _bond_limits(dense: nn.Module) -> tuple[int, ...]:
    """The smaller side of each unfolding."""
    cls = lr.TensorizedEmbedding if isinstance(dense, nn.Embedding) else lr.TensorizedLinear
    sizes = [n * d for n, d in zip(*cls.like(dense, rank=1).split, strict=True)]
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
    LayerRow(
        lr.PivotLinear,
        LINEAR_VARIANTS,
        wide=({"in_features": 64, "out_features": 96}, 24),
        sample=lambda linear, lead: torch.randn(*lead, linear.in_features),
        sample_shape=lambda linear: (linear.in_features,),
        full=lambda linear: min(linear.weight.shape),
        small=2,
        excess=1000,
        matrix=lambda weight: weight,
        balanced=False,
        buffers=("order",),
    ),
    LayerRow(
        lr.TensorizedLinear,
        LINEAR_VARIANTS,
        wide=({"in_features": 64, "out_features": 96}, 12),
        sample=lambda linear, lead: torch.randn(*lead, linear.in_features),
        sample_shape=lambda linear: (linear.in_features,),
        full=_bond_limits,
        small=(2,),
        excess=1000,
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
        sample=lambda embedding, lead: torch.randint(embedding.num_embeddings, (*lead, 7)),
        sample_shape=lambda embedding: (7,),
        full=lambda embedding: min(embedding.weight.shape),
        small=2,
        excess=1000,
        matrix=lambda weight: weight,
        smoke=("plain", "padding_idx", "max_norm"),
    ),
    LayerRow(
        lr.LowRankEmbeddingBag,
        BAG_VARIANTS,
        wide=({"num_embeddings": 96, "embedding_dim": 64}, 24),
        sample=lambda embedding, lead: torch.randint(embedding.num_embeddings, (*lead, 7)),
        sample_shape=lambda embedding: (7,),
        full=lambda embedding: min(embedding.weight.shape),
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
        sample=lambda embedding, lead: torch.randint(embedding.num_embeddings, (*lead, 7)),
        sample_shape=lambda embedding: (7,),
        full=_bond_limits,
        small=(2, 2),
        excess=1000,
        smoke=("plain", "padding_idx"),
        again=False,
    ),
]
