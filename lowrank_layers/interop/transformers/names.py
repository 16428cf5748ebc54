"""Names of layers in a folder and in the model that is read from it, which may be a part of the one that was saved."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ...errors import CheckpointError
from ...layers import PROJECTIONS
from ...layers.config import Spec
from ...modules import ModelDescription


def fitted_to(model: Any, description: ModelDescription) -> ModelDescription:
    """Returns the description with the names and dtypes of a model.

    As transformers does with weights, the prefix of the model without a head (``"model."``) is added or left out where
    that finds the layer, and names of older versions of transformers are replaced by those of this one. Layers of
    another head than the model has are left out, if the model is of another class than the one that was saved.

    Args:
        model: a dense model of transformers; not changed.
        description: of the model that was saved.

    Raises:
        CheckpointError: if the model has none of the layers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    opened = set(description.opened)
    prefix = f"{model.base_model_prefix}."
    same = type(model).__name__ in (model.config.architectures or [type(model).__name__])

    def find(name: str) -> str | None:
        parent, _, child = name.rpartition(".")
        for each in (name, prefix + name, name.removeprefix(prefix)):
            if each in modules or (child in PROJECTIONS and parent in opened and each.rpartition(".")[0] in modules):
                return each
        renamed = newer_name(model, name)
        return renamed if renamed in modules or same else None

    layers = {new: spec for name, spec in description.layers.items() if (new := find(name)) is not None}
    resized = {new: spec for name, spec in description.resized.items() if (new := find(name)) is not None}
    places = tuple(new for name in description.opened if (new := find(name)) is not None)
    if (description.layers or description.resized) and not (layers or resized):
        raise CheckpointError(
            f"config.json: quantization_config: {type(model).__name__} has none of its layers, such as"
            f" {next(iter(description.layers or description.resized))!r}; it is for another model."
        )
    return ModelDescription(
        layers, places, {name: _with_dtype(spec, modules.get(name)) for name, spec in resized.items()}
    )


def newer_name(model: Any, name: str) -> str:
    """Returns the name that this version of transformers has for a layer that an older one may have saved.

    Args:
        model: a model of transformers.
        name: the name of a layer.
    """
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    weight, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, model.state_dict())
    return str(weight).removesuffix(".weight")


def _with_dtype(spec: Spec, module: nn.Module | None) -> Spec:
    """The settings in the dtype of the model, which ``from_pretrained(dtype=)`` chooses."""
    if module is None:
        return spec
    dtype = next(iter(module.state_dict().values())).dtype
    return {**spec, "dtype": str(dtype).removeprefix("torch.")}
