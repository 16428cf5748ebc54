"""Low-rank layers, and layers of other sizes, for models that are read without lowrank_layers, which wrote this file.

The class of the model stands at its end. ``from_pretrained(folder, trust_remote_code=True)`` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

_SIZES = ("in_features", "out_features", "nf", "nx", "num_embeddings", "embedding_dim", "padding_idx")


class LowRankPair(nn.Module):
    """Two thin layers in a row, in the place of a linear layer, transformers' ``Conv1D`` or an embedding.

    Args:
        dense: the layer to imitate: its sizes, device and dtype.
        rank: inner dimension.
        bias: whether the second layer has a bias.
    """

    def __init__(self, dense: nn.Module, rank: int, bias: bool) -> None:
        super().__init__()
        weight: torch.Tensor = dense.weight  # type: ignore[assignment]
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.stored_as_inputs_times_outputs = not isinstance(dense, nn.Linear)
        inputs, outputs = weight.shape if self.stored_as_inputs_times_outputs else (weight.shape[1], weight.shape[0])
        self.down: nn.Module
        if isinstance(dense, nn.Embedding):
            self.down = nn.Embedding(inputs, rank, dense.padding_idx, **place)
        else:
            self.down = nn.Linear(inputs, rank, bias=False, **place)
        self.up = nn.Linear(rank, outputs, bias=bias, **place)
        self.__dict__.update({name: getattr(dense, name) for name in _SIZES if hasattr(dense, name)})

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, multiplied out."""
        down: torch.Tensor = self.down.weight  # type: ignore[assignment]
        if isinstance(self.down, nn.Embedding):
            return down @ self.up.weight.mT
        product = self.up.weight @ down
        return product.mT if self.stored_as_inputs_times_outputs else product

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias."""
        return self.up.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Computes what the dense layer would."""
        out: torch.Tensor = self.up(self.down(input))
        return out


class LowRankPivot(LowRankPair):
    """A linear layer, or transformers' ``Conv1D``, in pivot form: ``up(x_p + down(x_o))``.

    Args:
        dense: the layer to imitate: its sizes, device and dtype.
        rank: the number of inputs that are pivots.
        bias: whether the last layer has a bias.
    """

    order: torch.Tensor

    def __init__(self, dense: nn.Module, rank: int, bias: bool) -> None:
        super().__init__(dense, rank, bias)
        factor: torch.Tensor = self.down.weight  # type: ignore[assignment]
        inputs, place = factor.shape[1], {"device": factor.device, "dtype": factor.dtype}
        self.down = nn.Linear(inputs - rank, rank, bias=False, **place)
        self.register_buffer("order", torch.arange(inputs, device=factor.device))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, multiplied out."""
        others: torch.Tensor = self.down.weight  # type: ignore[assignment]
        identity = torch.eye(self.up.in_features, dtype=others.dtype, device=others.device)
        product = self.up.weight @ torch.cat([identity, others], 1).index_select(1, self.order.argsort())
        return product.mT if self.stored_as_inputs_times_outputs else product

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Computes what the dense layer would."""
        rank = self.up.in_features
        pivots, others = input.index_select(-1, self.order).split([rank, input.shape[-1] - rank], -1)
        out: torch.Tensor = self.up(pivots + self.down(others))
        return out


def resize_(model: transformers.PreTrainedModel, layers: Mapping[str, Mapping[str, int]]) -> None:
    """Puts uninitialized linear layers of other sizes into a dense model, in place.

    Args:
        model: a dense model.
        layers: ``in_features`` and ``out_features``, by the name of the layer.
    """
    for name, sizes in layers.items():
        parent, _, child = name.rpartition(".")
        dense: Any = model.get_submodule(name)
        place = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        setattr(model.get_submodule(parent), child, nn.Linear(**sizes, bias=dense.bias is not None, **place))


def make_low_rank_(model: transformers.PreTrainedModel, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts uninitialized low-rank layers into a dense model, in place.

    Args:
        model: a dense model.
        layers: rank, bias and whether it is in pivot form, by the name of the layer.
    """
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        kind = LowRankPivot if layer["pivot"] else LowRankPair
        setattr(model.get_submodule(parent), child, kind(model.get_submodule(name), layer["rank"], layer["bias"]))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {a: b for a, b in tied.items() if a in parameters and b in parameters}
