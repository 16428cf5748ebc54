"""The entry ``quantization_config`` of a ``config.json`` as vLLM reads it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from ...errors import CheckpointError
from ...modules import QUANT_METHOD, ModelDescription, from_quantization_config
from .linear_method import RESIZED_BIAS, LowRankLinearMethod
from .shards import Shard

TYPES = ("LowRankLinear", "PivotLinear")
"""Classes of the layers that vLLM's linear layers can stand for."""


class VLLMLowRankConfig(QuantizationConfig):
    """Tells vLLM which of its linear layers are low-rank, in whole or in part, and which have sizes of their own.

    Where vLLM computes several layers of the model as one, such as query, key and value, each has its own factors, or
    its dense weight. Layers that have lost hidden units are resized, to a number that may be another one in each block.

    Args:
        description: of the model that was saved.

    Raises:
        CheckpointError: if it has low-rank or resized layers of other kinds, or open attentions.
    """

    def __init__(self, description: ModelDescription) -> None:
        super().__init__()
        for name, spec in description.layers.items():
            if spec.type not in TYPES or spec.bits is not None:
                kind = spec.type if spec.bits is None else f"{spec.type} with {spec.bits} bits"
                raise CheckpointError(
                    f"config.json: vLLM cannot serve {name!r}, a {kind}, expected {' or '.join(TYPES)} in floating"
                    " point; plan with skip= for layers of other kinds, and without bits=."
                )
        if description.opened:
            raise CheckpointError(
                f"config.json: vLLM cannot serve {description.opened[0]!r}, an attention in four parts; plan with"
                f" skip=[{description.opened[0]!r}]."
            )
        for name, dense in description.resized.items():
            if dense.get("type") != "Linear":
                raise CheckpointError(
                    f"config.json: vLLM cannot serve {name!r}, a {dense.get('type')} of other sizes than the model's"
                    " configuration says, expected Linear; plan with uniform=True, or with skip= for this layer."
                )
        self.layers = dict(description.layers)
        self.resized = dict(description.resized)
        self._saved_names = {name: name for name in (*self.layers, *self.resized)}
        self._methods: list[LowRankLinearMethod] = []

    @classmethod
    def get_name(cls) -> str:
        """Returns the name of the format."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the dtypes in which a model can be served."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least compute capability of a GPU: any, since there are only products of matrices."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns the files of the configuration beside ``config.json``: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VLLMLowRankConfig:
        """Reads the values of the entry.

        Args:
            config: the values.

        Raises:
            CheckpointError: for another version of the format, damaged values, and what vLLM cannot serve.
        """
        return cls(from_quantization_config(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Takes on the names that vLLM has for modules.

        Args:
            hf_to_vllm_mapper: vLLM's mapping of names.
        """
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.resized = hf_to_vllm_mapper.apply_dict(self.resized)
        self._saved_names = hf_to_vllm_mapper.apply_dict(self._saved_names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Returns how a layer is computed; ``None`` for what is no linear layer.

        Args:
            layer: a layer of vLLM.
            prefix: its name.

        Raises:
            CheckpointError: if a layer is low-rank or resized that is no linear one for vLLM, such as an embedding, or
                the query, key or value of an attention is resized.
        """
        parent, dot, own = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(own, [own])]
        is_resized = any(part in self.resized for part in parts)
        if not is_resized and not any(part in self.layers for part in parts):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase) or (is_resized and isinstance(layer, QKVParallelLinear)):
            what = "resized" if is_resized else "low-rank"
            raise CheckpointError(
                f"config.json: {prefix!r} is {what}, but vLLM has no {what} {type(layer).__name__}; plan with"
                f" skip=[{own!r}]."
            )
        ids: list[Any] = [None]
        if len(parts) > 1:
            ids = ["q", "k", "v"] if isinstance(layer, QKVParallelLinear) else list(range(len(parts)))
        shards = [
            Shard(part, key, self.layers.get(part), self.resized.get(part))
            for part, key in zip(parts, ids, strict=True)
        ]
        self._methods.append(LowRankLinearMethod(shards))
        return self._methods[-1]

    def get_checkpoint_weight_mapper(self) -> Any:
        """Returns the names that biases in the files have in vLLM's layers: ``bias``, or that of a resized layer."""
        factors, resized = [], []
        for method in self._methods:
            for shard in method.shards:
                if shard.spec is not None and not method.has_own_bias:
                    factors.append(re.escape(self._saved_names[shard.name]))
                elif shard.spec is None and shard.has_bias and method.has_own_bias:
                    resized.append(re.escape(self._saved_names[shard.name]))
        names = {}
        if factors:
            names[re.compile(rf"^({'|'.join(factors)})\.up\.bias$")] = r"\1.bias"
        if resized:
            names[re.compile(rf"^({'|'.join(resized)})\.bias$")] = rf"\1.{RESIZED_BIAS}"
        return WeightsMapper(orig_to_new_regex=names)
