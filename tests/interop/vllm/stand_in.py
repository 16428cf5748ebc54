"""The part of vLLM that a quantization method meets, by the signatures of vLLM 0.33 (its linear layers and loader).

vLLM itself needs a GPU build of torch. Layers here are split over processes as there, but all run in this one, each
with the rank it is given.
"""

import sys
import types

import torch
from torch import nn

REGISTERED = {}


class WeightsMapper:
    def __init__(self, orig_to_new_regex):
        self.orig_to_new_regex = orig_to_new_regex

    def map_name(self, key):
        for pattern, new in self.orig_to_new_regex.items():
            key = pattern.sub(new, key)
        return key


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        shape = sum(output_partition_sizes), input_size_per_partition
        layer.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


def divide(number, parts):
    """An assertion in vLLM too: of the sizes in the configuration, which are not those of resized layers."""
    assert number % parts == 0, f"{number} is not divisible by {parts}"
    return number // parts


class SiluAndMul(nn.Module):
    """Halves its input, of whatever size that is."""

    def forward(self, x):
        gate, up = x.split(x.shape[-1] // 2, -1)
        return nn.functional.silu(gate) * up


class LinearBase(nn.Module):
    """A layer of which process ``rank`` of ``size`` has a part."""

    def __init__(self, inputs, outputs, local_inputs, local_outputs, bias, config, prefix, rank, size):
        super().__init__()
        self.tp_rank, self.tp_size, self.has_bias = rank, size, bias
        self.quant_method = config.get_quant_method(self, prefix)
        self.local_outputs = local_outputs
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=local_inputs,
            output_partition_sizes=local_outputs,
            input_size=inputs,
            output_size=outputs,
            params_dtype=torch.float32,
            weight_loader=None,
        )
        self.bias = nn.Parameter(torch.full((sum(local_outputs),), torch.nan), requires_grad=False) if bias else None

    def forward(self, x):
        bias = None if isinstance(self, RowParallelLinear) and self.tp_rank > 0 else self.bias
        return self.quant_method.apply(self, x, bias)


class ColumnParallelLinear(LinearBase):
    def __init__(self, inputs, output_sizes, bias, config, prefix, rank=0, size=1):
        local = [divide(outputs, size) for outputs in output_sizes]
        super().__init__(inputs, sum(local) * size, inputs, local, bias, config, prefix, rank, size)


class MergedColumnParallelLinear(ColumnParallelLinear):
    pass


class QKVParallelLinear(LinearBase):
    def __init__(self, inputs, head, heads, kv_heads, bias, config, prefix, rank=0, size=1):
        self_kv = max(1, kv_heads // size)
        nn.Module.__init__(self)
        replicas = max(1, size // kv_heads)
        local = [heads // size * head, self_kv * head, self_kv * head]
        # set before create_weights, as there
        object.__setattr__(self, "_replicas", replicas)
        super().__init__(inputs, sum(local) * size, inputs, local, bias, config, prefix, rank, size)

    @property
    def num_kv_head_replicas(self):
        return self._replicas


class RowParallelLinear(LinearBase):
    def __init__(self, inputs, outputs, bias, config, prefix, rank=0, size=1):
        super().__init__(inputs, outputs, divide(inputs, size), [outputs], bias, config, prefix, rank, size)


def register_quantization_config(quantization):
    def register(cls):
        assert issubclass(cls, QuantizationConfig)
        REGISTERED[quantization] = cls
        return cls

    return register


def modules():
    """The modules by name."""
    linear = types.ModuleType("vllm.model_executor.layers.linear")
    for cls in (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    ):
        setattr(linear, cls.__name__, cls)
    base = types.ModuleType("vllm.model_executor.layers.quantization.base_config")
    base.QuantizationConfig = QuantizationConfig
    quantization = types.ModuleType("vllm.model_executor.layers.quantization")
    quantization.register_quantization_config = register_quantization_config
    utils = types.ModuleType("vllm.model_executor.models.utils")
    utils.WeightsMapper = WeightsMapper
    found = {each.__name__: each for each in (linear, base, quantization, utils)}
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.models"):
        found[name] = types.ModuleType(name)
    return found


def install(monkeypatch):
    """Puts the stand-in in the place of vLLM; our modules are imported anew, on it."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("lowrank_layers.interop.vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    REGISTERED.clear()
