"""What PEFT's tests read off a layer, read off ours: views of the same parameters, nothing that computes."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lowrank_layers.lora.adapted import Adapted
from lowrank_layers.lora.adapted_weight import banks_of, base_weight
from lowrank_layers.lora.module_copies import COPIES
from lowrank_layers.lora.trainable_tokens import TokenRows
from lowrank_layers.lora.trained_whole import TrainedWhole
from lowrank_layers.lora.weight_layout import Matrix, is_conv1d

NAMES = ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]


def install():
    """Makes ``isinstance(layer, LoraLayer)`` and the attributes of PEFT's layers hold for adapted modules."""
    LoraLayer.register(Adapted)
    for name, read in VIEWS.items():
        setattr(Adapted, name, property(read))
    TrainedWhole.modules_to_save = property(lambda self: self._modules[COPIES])
    TrainedWhole.original_module = property(lambda self: Base(self, self._parameters))
    TrainedWhole.active_adapters = property(whole_active)
    TrainedWhole.adapter_layer_names = ["modules_to_save"]
    Adapted.adapter_layer_names = NAMES
    Adapted.other_param_names = ["r", "lora_alpha", "scaling", "lora_dropout"]
    Adapted.get_base_layer = lambda self: base_layer(self)
    Adapted.enable_adapters = lambda self, enabled: use(self, active(self) if enabled else ())
    Adapted.set_adapter = lambda self, names, **_: use(self, [names] if isinstance(names, str) else names)
    Adapted._all_available_adapter_names = lambda self: bank(self).names
    Adapted.get_delta_weight = lambda self, name: bank(self).named(name)[0].delta(bank(self).layout)


def whole_active(module):
    copies = module._modules[COPIES]
    return [name for name in copies if name == copies.active]


def use(module, names):
    """Chooses the adapters of one layer."""
    for found in banks_of(module).values():
        for name, adapter in found.adapters.items():
            adapter.use_(name in names)


def bank(module):
    """The adapters of the layer; of an attention, those of its input projection."""
    return next(iter(banks_of(module).values()))


def is_embedding(module):
    kind = bank(module).layout
    return isinstance(kind, Matrix) and kind.transposed and not is_conv1d(module)


class Factor(nn.Module):
    """``lora_A["default"]``: the parameter itself, under PEFT's name."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = weight, bias


class Live(Mapping):
    """A value for each adapter of a layer, read when it is asked for: an adapter that is taken off is gone."""

    def __init__(self, bank, value, among=lambda adapter: True):
        self._bank, self._value, self._among = bank, value, among

    def __getitem__(self, name):
        adapters = dict(self._bank.adapters.items())
        if name not in adapters or not self._among(adapters[name]):
            raise KeyError(name)
        return self._value(adapters[name])

    def __iter__(self):
        return iter([name for name, adapter in self._bank.adapters.items() if self._among(adapter)])

    def __len__(self):
        return len(list(iter(self)))

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def factors(which):
    return lambda module: Live(
        bank(module),
        lambda adapter: Factor(getattr(adapter, which), adapter.bias if which == "B" else None),
        lambda _: not is_embedding(module),
    )


def tables(which):
    return lambda module: Live(bank(module), lambda adapter: getattr(adapter, which), lambda _: is_embedding(module))


def magnitudes(module):
    return Live(bank(module), lambda adapter: Factor(adapter.magnitude), lambda adapter: adapter.magnitude is not None)


def each(value):
    return lambda module: Live(bank(module), lambda adapter: value(module, adapter))


def rank(module, adapter):
    groups = getattr(bank(module).layout, "groups", 1)
    return adapter.B.shape[1 if is_kernel(module) else -1] * groups


def is_kernel(module):
    return not isinstance(bank(module).layout, Matrix)


def base_layer(module):
    """The plain layer below: its own parameters."""
    plain = {key: value for key, value in module._parameters.items() if key not in banks_of(module)}
    own = {key: base_weight(module, key) for key in banks_of(module)}
    return Base(module, {**plain, **own})


class Tokens(type):
    """``isinstance(module, TrainableTokensWrapper)``: an embedding of which chosen rows learn."""

    def __instancecheck__(cls, module):
        return isinstance(module, Adapted) and any(isinstance(adapter, TokenRows) for adapter in bank(module))


class TrainableTokensWrapper(metaclass=Tokens):
    """What PEFT's tests import under this name."""


def token_adapter(module):
    if not isinstance(module, TrainableTokensWrapper):
        raise AttributeError("token_adapter")
    among = lambda adapter: isinstance(adapter, TokenRows)  # noqa: E731
    rows = Live(bank(module), lambda adapter: adapter.rows, among)
    base = Live(bank(module), lambda adapter: base_weight(module, "weight")[adapter.tokens], among)
    return SimpleNamespace(trainable_tokens_delta=rows, trainable_tokens_original=base)


class Base(SimpleNamespace):
    def __init__(self, module, parameters):
        super().__init__(**parameters, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)

    @property
    def __class__(self):
        return self._module._plain_class


def merged(module):
    return bank(module).merged is not None


def merged_adapters(module):
    found = bank(module)
    return [name for name, gate in zip(found.names, found.gates, strict=True) if gate] if merged(module) else []


def active(module):
    """Adapters are chosen for the model, and PEFT's layers tell the choice whether they have the adapter or not."""
    names = getattr(module, "_shim_active", lambda: ["default"])()
    return (
        [name for name in names if name in bank(module).names] if isinstance(module, TrainableTokensWrapper) else names
    )


VIEWS = {
    "lora_A": factors("A"),
    "lora_B": factors("B"),
    "lora_embedding_A": tables("A"),
    "lora_embedding_B": tables("B"),
    "lora_magnitude_vector": magnitudes,
    "scaling": each(lambda module, adapter: float(adapter.scaling)),
    "r": each(rank),
    "lora_alpha": each(lambda module, adapter: float(adapter.scaling) * rank(module, adapter)),
    "lora_dropout": each(lambda module, adapter: nn.Dropout(adapter.dropout) if adapter.dropout else nn.Identity()),
    "lora_bias": each(lambda module, adapter: adapter.bias is not None),
    "use_dora": each(lambda module, adapter: adapter.magnitude is not None),
    "base_layer": base_layer,
    "token_adapter": token_adapter,
    "merged": merged,
    "merged_adapters": merged_adapters,
    "disable_adapters": lambda module: not bool(torch.any(bank(module).gates)),
    "active_adapters": active,
    "active_adapter": active,
}
