"""Our names of parameters with PEFT's."""

from lowrank_layers.lora.adapted import Adapted
from lowrank_layers.lora.adapted_weight import banks_of
from lowrank_layers.lora.module_copies import COPIES
from lowrank_layers.lora.trained_whole import TrainedWhole

from .layers import is_embedding


def translations(model):
    """Our names of parameters with PEFT's."""
    found = {}
    for owner, module in model.named_modules():
        for parameter, bank in banks_of(module).items():
            table = is_embedding(module)
            for name in bank.names:
                ours = f"{owner}.lora_{parameter}.adapters.{name}."
                a, b = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A", "lora_B")
                end = "" if table else ".weight"
                found |= {f"{ours}A": f"{owner}.{a}.{name}{end}", f"{ours}B": f"{owner}.{b}.{name}{end}"}
                found[f"{ours}rows"] = f"{owner}.token_adapter.trainable_tokens_delta.{name}"
                found[f"{ours}magnitude"] = f"{owner}.lora_magnitude_vector.{name}.weight"
                found[f"{ours}bias"] = f"{owner}.lora_B.{name}.bias"
        if isinstance(module, TrainedWhole):
            copies = f"{owner}.{COPIES}."
            found |= {name: f"{owner}.modules_to_save.{name.removeprefix(copies)}" for name in _names(module, copies)}
            found |= {f"{owner}.{name}": f"{owner}.original_module.{name}" for name in _own_names(module)}
        if isinstance(module, Adapted):
            for key in module._parameters:
                found[f"{owner}.{key}"] = f"{owner}.base_layer.{key}"
    return found


def _names(module, prefix):
    return [prefix + key for key in module._modules[COPIES].state_dict()]


def _own_names(module):
    return [key for key in module.state_dict() if not key.startswith(COPIES)]
