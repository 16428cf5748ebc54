"""The layers of a model that are planned, and the reasons why others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..calibrate.statistics import Statistics
from ..errors import LowRankError
from ..layers import is_derived, is_factored
from ..modules import reasons_to_keep, walk_layers
from .candidates import Candidate
from .registry import METHODS
from .request import Request

UNREACHED = "smallest rank, since no gradient of the loss reaches it"
"""The plan's note on a layer whose output does not change the loss."""


def eligible_layers(
    model: nn.Module, request: Request, skipped_names: set[str]
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The layers to plan for, and the reason for every other weight of two dimensions or more, both by name.

    Args:
        model: the dense model, its attentions opened.
        request: what make_plan was asked for.
        skipped_names: names of the layers that are to be left alone.
    """
    stats = request.stats
    reasons = reasons_to_keep(model)
    methods = request.methods or METHODS.values()  # a layer of a group is one that some single method would take
    idle = set() if stats is None else without_gradient(stats)
    found: dict[str, Candidate] = {}
    skipped: dict[str, str] = {}
    for name, module in walk_layers(model):
        weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if is_factored(module) or isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue
        if not weights and not is_derived(module):
            continue
        layer = request.candidate(module, None if stats is None else stats.get(name), idle=name in idle)
        if name in skipped_names:
            skipped[name] = "as asked"
        elif name in reasons:
            skipped[name] = reasons[name]
        elif not any(method.matches(layer) for method in methods):
            skipped.update(_unmatched(name, module))
        elif name == "":
            raise LowRankError(
                f"the model itself is a {type(module).__name__} and cannot be replaced in place;"
                " wrap it in nn.Sequential, or use from_dense."
            )
        elif any(p.is_meta for p in weights):
            raise LowRankError(f"{name!r}: its weight is on the meta device; load the weights first.")
        elif stats is not None and (layer.stats is None or not layer.stats.inputs.rows):
            skipped[name] = "calibration never reached it"
        elif layer.stats is not None and layer.idle and not layer.stats.traced:
            skipped[name] = "it ran without gradients (torch.no_grad), so that its effect on the loss is not known"
        else:
            found[name] = layer
    return found, skipped


def without_gradient(stats: Statistics) -> set[str]:
    """Layers on which the loss does not depend: no gradient reached them, although one reached others."""
    reached = {
        name for name, each in stats.items() if each.gradients is not None and bool(each.gradients.count_nonzero())
    }
    return set(stats) - reached if reached else set()


def _unmatched(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields name and reason for a layer that no method takes, or for parameters that a larger module holds itself."""
    kind = type(module).__name__
    known = {"nn.MultiheadAttention", *(cls.dense_name() for method in METHODS.values() for cls in method.layers)}
    parents = [parent for parent in type(module).__mro__ if f"nn.{parent.__name__}" in known]
    if isinstance(module, nn.RNNBase):
        yield name, f"no method for {kind}: torch's recurrent kernels take whole matrices"
    elif isinstance(module, nn.EmbeddingBag):
        yield name, f"no method for {kind} with mode={module.mode!r}"
    elif type(module) is nn.MultiheadAttention:
        yield name, f"{kind} as the model itself cannot be opened in place; wrap it in nn.Sequential"
    elif parents and parents[0] is not type(module):
        yield name, f"no method for {kind}, a subclass of nn.{parents[0].__name__} that may compute something else"
    elif not parents and (name == "" or any(True for _ in module.children())):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                yield f"{name}.{key}" if name else key, f"a parameter of {kind} itself, which no layer holds"
    else:
        yield name, f"no method for {kind}"
