"""PEFT's model, of which every call goes to ours; its names of parameters are translated, no value is."""

import re
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapted import Adapted
from lowrank_layers.lora.adapted_weight import banks_of
from lowrank_layers.lora.adapter_file import read_tensors
from lowrank_layers.lora.attach import banks
from lowrank_layers.lora.module_copies import copies_of
from lowrank_layers.lora.trained_whole import TrainedWhole

from .adding import add_lora
from .names import translations

BASE = "__base__"


WORDS = {
    r"remove_lora_: .*merged": "Cannot delete adapter(s) ['{name}'] while they are merged. Please unmerge them first.",
    r"use_adapter: .*tokens": "Only one adapter can be set at a time for TrainableTokensWrapper",
    r"use_adapter: .*trained whole": "Only one adapter can be set at a time for ModulesToSaveWrapper",
    r"combine_lora_: .*trained whole": "Cannot add weighted adapters if they target the same module with"
    " modules_to_save, but found 1 such instance(s).",
    r"merge_lora_: .*NaN": "NaNs detected in the merged weights. The adapter {name} seems to be broken",
}
"""What ours refuses, and how PEFT says it: the refusal has to be ours."""


@contextmanager
def peft_warnings():
    """Ours of keys of patterns that match nothing, in PEFT's words and category; others as they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        match = re.match(r"add_lora_: (\w+) has the keys (.*), which match no layer", str(each.message))
        if match:
            words = f"The following {match[1]} keys did not match any targeted module and were ignored: {match[2]}."
            warnings.warn(words, RuntimeWarning, stacklevel=3)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@contextmanager
def peft_words(name="default"):
    try:
        yield
    except lr.LowRankError as error:
        for ours, theirs in WORDS.items():
            if re.match(ours, str(error), re.DOTALL):
                raise ValueError(theirs.format(name=name)) from error
        raise


class LoraModel(nn.Module):
    """``base_model``: the adapted model, and which of its adapters are in use."""

    prefix = "lora_"

    def __init__(self, model, peft_config):
        super().__init__()
        self.model = model
        self.peft_config = peft_config
        self.__dict__["active"] = []

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def has_active_enabled_adapter(self):
        return any(bool(torch.any(bank.gates)) for bank in banks(self.model))

    @property
    def active_adapters(self):
        return list(self.active)

    @property
    def active_adapter(self):
        return list(self.active)

    def set_adapter(self, names, inference_mode=False):
        names = [names] if isinstance(names, str) else list(names)
        with peft_words():
            lr.use_adapter(self.model, names)
        self.active[:] = names
        for module in self.model.modules():
            if isinstance(module, (Adapted, TrainedWhole)):
                module.__dict__["_shim_active"] = self._now
        if inference_mode:
            for parameter in lr.lora_parameters(self.model):
                parameter.requires_grad_(False)

    def _now(self):
        return list(self.active)

    def add(self, name, config, dtype=None):
        if name in self.peft_config:
            raise ValueError(f"Adapter with name '{name}' already exists")
        with peft_warnings():
            add_lora(self.model, name, config, dtype)
        self.peft_config[name] = config
        self.set_adapter(self.active or [name])

    def delete_adapter(self, adapter_name):
        name = adapter_name
        if name not in self.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
        with peft_words(name):
            lr.remove_lora_(self.model, name)
        del self.peft_config[name]
        left = [each for each in self.active if each != name] or list(self.peft_config)[:1]
        self.active[:] = left
        if left:
            self.set_adapter(left)

    @contextmanager
    def disable_adapter(self):
        with lr.lora_disabled(self.model):
            yield

    def disable_adapter_layers(self):
        lr.use_adapter(self.model, None)

    def enable_adapter_layers(self):
        lr.use_adapter(self.model, self.active)

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        if adapter_names is not None:
            lr.use_adapter(self.model, adapter_names)
        with peft_words(self.active[0]):
            lr.merge_lora_(self.model, safe_merge=safe_merge)

    def unmerge_adapter(self):
        lr.unmerge_lora_(self.model)

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        if adapter_names is not None:
            lr.use_adapter(self.model, adapter_names)
        with peft_words(self.active[0]):
            return lr.merge_lora_(self.model, unload=True, safe_merge=safe_merge)

    def unload(self):
        return lr.remove_lora_(self.model)

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="svd", svd_rank=None, **more):
        kept = {key: value for key, value in more.items() if key == "density" and value is not None}
        if svd_rank is not None:
            kept["rank"] = svd_rank
        found = dict(zip(adapters, weights, strict=True))
        with peft_words():
            lr.combine_lora_(self.model, found, adapter_name, how=combination_type, **kept)
        self.peft_config[adapter_name] = self.peft_config[adapters[0]]
        self.set_adapter(self.active)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for module in self.model.modules():
                for bank in banks_of(module).values():
                    for adapter in bank.named(name):
                        adapter.requires_grad_(requires_grad)
            for copies in copies_of(self.model).values():
                if name in copies:
                    copies[name].requires_grad_(requires_grad)


class PeftModel(nn.Module):
    """PEFT's outer model."""

    def __init__(self, model, peft_config, adapter_name="default", autocast_adapter_dtype=True, **_):
        super().__init__()
        self.peft_config = {}
        self.base_model = LoraModel(model, self.peft_config)
        if peft_config is not None:
            self.base_model.add(adapter_name, peft_config, None if autocast_adapter_dtype else "base")

    prefix = "lora_"

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args, adapter_names=None, **kwargs):
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with lr.lora_rows(self.base_model.model, [None if name == BASE else name for name in adapter_names]):
            return self.base_model(*args, **kwargs)

    @property
    def active_adapter(self):
        return self.base_model.active[0] if self.base_model.active else None

    @property
    def has_active_enabled_adapter(self):
        return self.base_model.has_active_enabled_adapter

    @property
    def active_peft_config(self):
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self):
        found = [set(config.modules_to_save or ()) for config in self.peft_config.values()]
        return set().union(*found) or None

    def get_base_model(self):
        return self.base_model.model

    def add_adapter(self, adapter_name, peft_config, autocast_adapter_dtype=True, **_):
        self.base_model.add(adapter_name, peft_config, None if autocast_adapter_dtype else "base")

    def set_adapter(self, name, inference_mode=False):
        if name not in self.peft_config:
            raise ValueError(f"Adapter {name} not found.")
        self.base_model.set_adapter(name, inference_mode)

    def disable_adapter(self):
        return self.base_model.disable_adapter()

    def push_to_hub(self, *_, **__):
        raise NotImplementedError

    def create_or_update_model_card(self, folder):
        lines = ["---", "library_name: peft", "tags: [lora]"]
        config = getattr(self.base_model.model, "config", None)
        lines += [f"base_model: {config.to_dict()['_name_or_path']}"] if config is not None else []
        (Path(folder) / "README.md").write_text("\n".join([*lines, "---", ""]))

    def save_pretrained(self, folder, safe_serialization=True, selected_adapters=None, **_):
        for name in selected_adapters or list(self.peft_config):
            path = Path(folder) if name == "default" else Path(folder) / name
            lr.save_lora(self.base_model.model, path, name)
            if not safe_serialization:
                file = path / "adapter_model.safetensors"
                torch.save(read_tensors(file), path / "adapter_model.bin")
                file.unlink()
        self.create_or_update_model_card(folder)

    @classmethod
    def from_pretrained(cls, model, folder, adapter_name="default", is_trainable=False, config=None, **more):
        made = cls(model, None)
        made.load_adapter(folder, adapter_name, is_trainable, config, **more)
        return made

    def load_adapter(self, folder, adapter_name, is_trainable=False, config=None, autocast_adapter_dtype=True, **_):
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists")
        config = peft.LoraConfig.from_pretrained(folder) if config is None else config
        config.inference_mode = not is_trainable
        dtype = next(self.parameters()).dtype
        lr.load_lora(self.base_model.model, folder, adapter_name, trainable=is_trainable)
        for bank in [] if autocast_adapter_dtype else banks(self.base_model.model):
            for adapter in bank.named(adapter_name):
                adapter.to(dtype)
        self.peft_config[adapter_name] = config
        first = not self.base_model.active  # a later one leaves what learns as it is
        self.base_model.set_adapter(self.base_model.active or [adapter_name], first and not is_trainable)
        if not is_trainable:
            self.eval()
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def named_parameters(self, *args, **kwargs):
        names = translations(self)
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield names.get(name, name), parameter

    def get_parameter(self, target):
        return dict(self.named_parameters())[target]

    def state_dict(self, *args, **kwargs):
        names = translations(self)
        found = super().state_dict(*args, **kwargs)
        return {names.get(key, key): value for key, value in found.items()}

    def load_state_dict(self, state, strict=True, **kwargs):
        names = {theirs: ours for ours, theirs in translations(self).items()}
        return super().load_state_dict({names.get(key, key): value for key, value in state.items()}, strict, **kwargs)

    def get_nb_trainable_parameters(self):
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def get_peft_model(model, peft_config, adapter_name="default", mixed=False, autocast_adapter_dtype=True, **more):
    if not isinstance(peft_config, peft.LoraConfig) or isinstance(peft_config, peft.AdaLoraConfig):
        raise NotImplementedError(f"another tuner: {type(peft_config).__name__}")
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


def inject_adapter_in_model(peft_config, model, adapter_name="default", **_):
    return add_lora(model, adapter_name, peft_config)


def get_peft_model_state_dict(model, adapter_name="default", **_):
    with tempfile.TemporaryDirectory() as folder:
        lr.save_lora(model.base_model.model, folder, adapter_name)
        return read_tensors(Path(folder) / "adapter_model.safetensors")


def set_peft_model_state_dict(model, state, adapter_name="default", **_):
    with tempfile.TemporaryDirectory() as folder:
        lr.save_lora(model.base_model.model, folder, adapter_name, bias=model.peft_config[adapter_name].bias)
        torch.save(dict(state), Path(folder) / "adapter_model.bin")
        (Path(folder) / "adapter_model.safetensors").unlink()
        lr.remove_lora_(model.base_model.model, adapter_name)
        lr.load_lora(model.base_model.model, folder, adapter_name)
    model.base_model.set_adapter(model.base_model.active)
    return SimpleNamespace(missing_keys=[], unexpected_keys=[])


def get_base_model_state_dict(model):
    return {key: value for key, value in model.get_base_model().state_dict().items() if ".lora_" not in f".{key}"}


def set_base_model_state_dict(model, state, strict=True):
    return model.get_base_model().load_state_dict(state, strict=strict)


def hotswap_adapter(model, model_name_or_path, adapter_name, **_):
    inner = getattr(model, "_orig_mod", model)
    lr.swap_lora_(inner.base_model.model, model_name_or_path, adapter_name)


FUNCTIONS = [get_peft_model, inject_adapter_in_model, get_peft_model_state_dict, set_peft_model_state_dict]
FUNCTIONS += [get_base_model_state_dict, set_base_model_state_dict, PeftModel]
