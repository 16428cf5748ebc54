"""How vLLM makes, fills and computes a linear layer whose shards are low-rank or resized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from ...errors import CheckpointError
from ...layers.pivot_linear import pivot_basis
from .shards import Shard, Sizes

Key = tuple[str, int]
"""The name of a parameter in a file (``"down.weight"``) and the index of its shard."""
RESIZED_BIAS = "resized.bias"
"""The name of the biases of dense shards that are resized."""


class LowRankLinearMethod(LinearMethodBase):
    r"""Computes :math:`U (V x) + b` for each shard of a layer, in pivot form :math:`U (x_p + C x_o) + b`.

    Parameters have the names of the files: ``down.weight`` (:math:`V` or :math:`C`), ``up.weight`` and ``order``;
    ``weight`` holds shards that are dense. Each is one flat tensor with the values of all shards. The bias is that of
    the layer of vLLM, or ``up.bias`` where that has none. Resized layers have their own, since that of vLLM may be of
    another size: ``up.bias``, and ``resized.bias`` where they are dense.

    In tensor parallelism a layer that is split along its outputs holds all of ``down`` and its rows of ``up``; one that
    is split along its inputs holds its columns of ``down`` and all of ``up``, and vLLM adds up what the processes
    return. Pivot form becomes a pair there, since the pivots are spread over the processes.

    Args:
        shards: the layers of the model that the layer stands for.

    Attributes:
        has_own_bias: whether biases are parameters of its own.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self._sizes: Sizes
        self._places: dict[Key, tuple[int, tuple[int, ...]]] = {}
        self._loaded: set[Key] = set()
        self._pairs = [not shard.has_pivots for shard in self.shards]
        self.has_own_bias = False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives a layer of vLLM its parameters, without values.

        Args:
            layer: the layer.
            input_size_per_partition: the number of its inputs in this process.
            output_partition_sizes: the number of outputs of each shard in this process.
            input_size: the number of all inputs.
            output_size: the number of outputs in all processes.
            params_dtype: the dtype of the weights.
            **extra_weight_attrs: what vLLM gives its own parameters, of which nothing is needed here.
        """
        sizes = Sizes.of(layer, self.shards, input_size_per_partition, output_partition_sizes, input_size, output_size)
        self._sizes = sizes
        is_resized = any(shard.resized is not None for shard in self.shards)
        self.has_own_bias = is_resized or not getattr(layer, "has_bias", False)
        shapes: dict[str, dict[int, tuple[int, ...]]] = {}
        for index, (shard, outputs) in enumerate(zip(self.shards, sizes.outputs, strict=True)):
            if shard.spec is None:
                shapes.setdefault("weight", {})[index] = (outputs, sizes.local_inputs)
                if shard.has_bias and self.has_own_bias:
                    shapes.setdefault(RESIZED_BIAS, {})[index] = (outputs,)
                continue
            rank = shard.spec.rank
            columns = sizes.inputs - rank if shard.has_pivots else sizes.local_inputs
            shapes.setdefault("down.weight", {})[index] = (rank, columns)
            shapes.setdefault("up.weight", {})[index] = (outputs, rank)
            if shard.has_bias and self.has_own_bias:
                shapes.setdefault("up.bias", {})[index] = (outputs,)
            if shard.has_pivots:
                shapes.setdefault("order", {})[index] = (sizes.inputs,)
        for name, each in shapes.items():
            self._register(layer, name, each, torch.int64 if name == "order" else params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Checks that all values are there, and prepares them.

        Args:
            layer: the layer of vLLM.

        Raises:
            CheckpointError: if the files lack any.
        """
        for name, index in self._places:
            if (name, index) not in self._loaded:
                raise CheckpointError(f"the files have no {self.shards[index].name}.{name}; save the model again.")
        if self.has_own_bias and getattr(layer, "bias", None) is not None:
            layer.register_parameter("bias", None)
        if self._sizes.splits_inputs and not self._pairs[0]:
            basis = pivot_basis(self._values(layer, "down.weight", 0), self._values(layer, "order", 0))
            own = basis[:, self._sizes.own_columns(_rank(layer))]
            own = F.pad(own, (0, self._sizes.local_inputs - own.shape[1])).contiguous()
            self._register(layer, "down.weight", {0: tuple(own.shape)}, own.dtype, own.flatten())
            self._pairs[0] = True

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes the outputs of all shards side by side.

        Args:
            layer: the layer of vLLM.
            x: its input.
            bias: vLLM's own bias.
        """
        if not any(shard.spec is not None or shard.has_bias for shard in self.shards):
            return F.linear(x, layer.get_parameter("weight").view(-1, self._sizes.local_inputs), bias)
        outputs = [self._output(layer, index, x) for index in range(len(self.shards))]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return output if bias is None else output + bias

    def _output(self, layer: nn.Module, index: int, x: Tensor) -> Tensor:
        values = partial(self._values, layer, index=index)
        spec = self.shards[index].spec
        has_bias = self.shards[index].has_bias and self.has_own_bias
        if spec is None:
            return F.linear(x, values("weight"), values(RESIZED_BIAS) if has_bias else None)
        if self._pairs[index]:
            hidden = F.linear(x, values("down.weight"))
        else:
            pivots, others = x.index_select(-1, values("order")).split([spec.rank, self._sizes.inputs - spec.rank], -1)
            hidden = pivots + F.linear(others, values("down.weight"))
        return F.linear(hidden, values("up.weight"), values("up.bias") if has_bias else None)

    def _register(
        self,
        layer: nn.Module,
        name: str,
        shapes: dict[int, tuple[int, ...]],
        dtype: torch.dtype,
        values: Tensor | None = None,
    ) -> None:
        """Registers one flat parameter, under a child of the layer where its name says so."""
        owner, _, last = name.rpartition(".")
        if owner and not hasattr(layer, owner):
            layer.add_module(owner, nn.Module())
        flat = torch.empty(sum(map(prod, shapes.values())), dtype=dtype) if values is None else values
        parameter = nn.Parameter(flat, requires_grad=False)
        parameter.weight_loader = self._loader(layer, name)  # type: ignore[attr-defined]
        layer.get_submodule(owner).register_parameter(last, parameter)
        start = 0
        for index, shape in shapes.items():
            self._places[name, index] = start, shape
            start += prod(shape)

    def _values(self, layer: nn.Module, name: str, index: int) -> Tensor:
        start, shape = self._places[name, index]
        return layer.get_parameter(name)[start : start + prod(shape)].view(shape)

    def _loader(self, layer: nn.Module, name: str) -> Callable[..., None]:
        """What vLLM calls with each tensor of the files that goes into a parameter."""

        def load(parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            key = getattr(loaded, "shard_id", None) if shard is None else shard
            index = next((k for k, each in enumerate(self.shards) if each.key == key), None)
            if index is None or (name, index) not in self._places:
                raise CheckpointError(
                    f"got a tensor {name!r} for the part {key!r} of {[each.name for each in self.shards]}, which"
                    " config.json does not describe so; save the model again."
                )
            self._copy(layer, name, index, loaded)

        return load

    def _copy(self, layer: nn.Module, name: str, index: int, loaded: Tensor) -> None:
        sizes, place, rank = self._sizes, self._values(layer, name, index), _rank(layer)
        has_outputs = name in ("up.weight", "up.bias", "weight", RESIZED_BIAS)
        has_inputs = name == "weight" or (name == "down.weight" and not self.shards[index].has_pivots)
        whole = list(place.shape)
        if has_outputs:
            whole[0] = sizes.all_outputs[index]
        if has_inputs:
            whole[1] = sizes.inputs
        if list(loaded.shape) != whole:
            raise CheckpointError(
                f"{self.shards[index].name}.{name}: got the shape {list(loaded.shape)}, expected {whole}; save the"
                " model again."
            )
        if has_outputs:
            loaded = loaded[sizes.own_rows(index, rank)]
        if has_inputs:
            loaded = loaded[:, sizes.own_columns(rank)]
        if name in ("up.bias", RESIZED_BIAS) and sizes.splits_inputs and rank > 0:
            loaded = torch.zeros_like(loaded)  # the outputs of all processes are added up
        place.zero_()[tuple(map(slice, loaded.shape))].copy_(loaded)
        self._loaded.add((name, index))


def _rank(layer: nn.Module) -> int:
    """The place of this process among those that share a layer."""
    return int(getattr(layer, "tp_rank", 0))
