"""A factored model and its optimizer in plain values, and back: what a progressive decomposition keeps on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...layers import is_factored
from ...modules import ModelDescription, named_tensors, replace_, walk_layers
from ..recovery import RecoverySettings
from ..recovery.state import write_state_


def snapshot_of(model: nn.Module) -> dict[str, Any]:
    """Returns which layers of a model are factored, and its parameters and buffers."""
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    return {"layers": ModelDescription.of(model).to_json(), "tensors": tensors}


def model_of(snapshot: Mapping[str, Any], dense: nn.Module) -> nn.Module:
    """Returns the model of a snapshot.

    Args:
        snapshot: what :func:`snapshot_of` returned.
        dense: the dense model that it was factorized from; not changed.
    """
    model = copy.deepcopy(dense)
    built = ModelDescription.from_json(snapshot["layers"]).build(model)
    modes = {name: model.get_submodule(name).training for name in built}
    replace_(model, {name: layer.train(modes[name]) for name, layer in built.items()})
    write_state_(named_tensors(model), snapshot["tensors"])
    return model


def become_(model: nn.Module, other: nn.Module) -> None:
    """Gives a model the factored layers and the values of another one, in place.

    Args:
        model: a model; what ``other`` was copied from.
        other: the other one; its factored layers are the model's afterwards.
    """
    theirs = dict(walk_layers(other))
    names = {name for each in (model, other) for name, module in walk_layers(each) if is_factored(module)}
    replace_(model, {name: theirs[name] for name in sorted(names)})
    write_state_(named_tensors(model), named_tensors(other))


def optimizer_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state of an optimizer by the names of parameters, whatever their order."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def new_optimizer(model: nn.Module, states: Mapping[str, Any], settings: RecoverySettings) -> torch.optim.Optimizer:
    """Returns an AdamW of all parameters that require gradients, with the states of :func:`optimizer_states`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer.state.update({parameters[name]: state for name, state in states.items() if name in parameters})
    return optimizer
