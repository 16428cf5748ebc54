"""Settings of dense layers that every factored layer is checked with, by name; ``"plain"`` has torch's defaults."""

from __future__ import annotations

from typing import Any

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


def transposed_variants(dims: int) -> dict[str, dict[str, Any]]:
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
