"""Removing hidden units from a model, under a budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import Loss, MaskOf, calibrate, check_batches, forward
from ...calibrate.example import first_sample
from ...calibrate.statistics import LayerStats
from ...cost import Cost
from ...errors import BudgetError, LowRankError
from ...layers import FactoredModule, mark_resized, matrices_of, unmark_resized
from ...modules import check_model
from ...rank import Budget
from ..damping import Damping
from ..recovery.scoring import samples_of
from ..regression import Regression
from .chain import Chained, adopt_sizes_
from .choose import choose_units, least_units
from .cut import columns_of
from .eliminate import eliminate, map_from
from .find import HiddenUnits, find_hidden_units
from .model_config import adopt_config_
from .problem import unit_problem


def remove_units_(
    model: nn.Module,
    data: Iterable[Any],
    budget: Budget,
    loss: Loss | None = None,
    *,
    damping: Damping | None = None,
    mask: MaskOf | None = None,
    uniform: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Removes hidden units, in place, and lets the layers that read them make up for those that are gone.

    Hidden units are the outputs of a linear layer or convolution that one other layer reads and nothing else: those of
    a perceptron, the inner channels of a residual block, the gated ones of a transformer. What a unit would have said
    is predicted from those that stay, by a regression on ``data``, as in Optimal Brain Surgeon (Hassibi and Stork,
    1993) and MoDeGPT (Lin et al., 2025). Again and again the unit goes whose removal is predicted to add the least loss
    per parameter that is saved. The result has the same layers with smaller sizes, and needs no retraining. An
    optimizer is made after it.

    It goes well with low-rank layers: where a layer has a low rank, few units say all that the next one wants to know.
    So factorize to two or three times the size that you want, and remove units for the rest: LeNet with a tenth of its
    parameters keeps 97.5 % of MNIST's test images right in place of 91.9 %.

    Args:
        model: a trained model, with low-rank layers or without.
        data: the batches that :func:`calibrate` takes.
        budget: the limit on the model's parameters: ``Budget(params=...)``.
        loss: weights errors by their effect on it, as in :func:`calibrate`; ``SampledCrossEntropy()`` needs no targets.
            Without it all outputs of the layers count the same.
        damping: ridges on the moments, by default ``Damping.default(stats)``.
        mask: what is padding in a batch, as in :func:`calibrate`.
        uniform: whether hidden layers of one size keep one size. A model of transformers stays what its configuration
            says then, with a smaller ``intermediate_size``: ``save_pretrained`` writes a folder that
            ``from_pretrained`` and other engines read without this library.
        progress: shows a progress bar.

    Returns:
        The model.

    Raises:
        BudgetError: if the budget limits something else, or there are not enough hidden units to keep it.
        LowRankError: if the model is wrapped or a batch is bad; the model is bit-identical then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = [torch.randn(100, 16)]
        >>> lr.remove_units_(model, batches, lr.Budget(params=0.5), loss=lr.SampledCrossEntropy())
        Sequential(
          (0): Linear(in_features=16, out_features=31, bias=True)
          (1): ReLU()
          (2): Linear(in_features=31, out_features=4, bias=True)
        )
    """
    check_model(model)
    check_batches(data, "remove_units_")
    excess = _excess(model, budget)
    batches = data if isinstance(data, (list, tuple)) else list(data)
    if not batches:
        raise LowRankError("remove_units_: got no batches in data.")
    if excess <= 0:
        return model
    chained = Chained.of(model)
    example = first_sample(batches[0], samples_of(batches[0]))
    found = find_hidden_units(chained.work, example, with_target=loss is not None)
    groups = [group for group in found if chained.owner(group.consumer) not in map(chained.owner, group.producers)]
    readers = {group.consumer for group in groups}
    if not readers:
        raise LowRankError("remove_units_: found no hidden units, outputs of a layer that one other layer reads.")
    stats = calibrate(
        chained.work, batches, loss, target=[lambda name, _: name in readers], mask=mask, progress=progress
    )
    damping = (damping or Damping.default(stats)).of_units
    problems = {group: _problem(chained, group, stats[group.consumer], damping) for group in groups}
    orders = {group: eliminate(problem, group.count) for group, problem in problems.items()}
    least = {group: _least(chained, group) for group in groups}
    chosen = choose_units(chained.modules, orders, least, excess, uniform=uniform)
    kept = {group: torch.tensor(units, device=problems[group].weight.device) for group, units in chosen.items()}
    matrices = {
        group: map_from(problems[group], columns_of(chained.modules[group.consumer], units, group.count))
        for group, units in kept.items()
    }
    copies = dict(chained.work.named_modules())
    for group, units in kept.items():
        group.take_(copies, units, matrices[group])
    try:
        forward(chained.work, example, with_target=loss is not None)
    except Exception as error:
        raise LowRankError(f"remove_units_: the model does not run with fewer units ({error}).") from error
    for group, units in kept.items():
        _remove_(chained, group, units, problems[group], matrices[group])
    chained.restore_pivots_(model)
    if uniform and adopt_config_(model, {group.count: len(units) for group, units in kept.items()}):
        for name in {name for group in kept for name in group.layers}:
            unmark_resized(chained.owner(name))
    return model


def _excess(model: nn.Module, budget: Budget) -> int:
    """The number of parameters by which a model exceeds a budget."""
    if not isinstance(budget, Budget) or budget.units != ("params",) or budget.loss is not None:
        raise BudgetError(
            f"remove_units_: got budget {budget!r}, expected a limit on parameters alone, such as Budget(params=0.5)."
        )
    params = sum(p.numel() for p in model.parameters())
    return params - int(budget.limits(Cost(params))["params"])


def _problem(chained: Chained, group: HiddenUnits, stats: LayerStats, damping: Damping) -> Regression:
    """The weighted problem of the layer that reads a group of units."""
    stats = stats.changed(free_bias=chained.biased(group.consumer) is not None)
    return unit_problem(chained.modules[group.consumer], stats, damping)


def _least(chained: Chained, group: HiddenUnits) -> int:
    """The least number of units that the ranks beside them allow."""
    beside = [(chained.owner(name), "out") for name in group.producers] + [(chained.owner(group.consumer), "in")]
    return max(
        [1, *(least_units(layer, side, group.count) for layer, side in beside if isinstance(layer, FactoredModule))]
    )


@torch.no_grad()
def _remove_(chained: Chained, group: HiddenUnits, units: Tensor, problem: Regression, matrix: Tensor) -> None:
    """Leaves the model with some units of a group, and corrects the layer that reads them."""
    reader, biased = chained.modules[group.consumer], chained.biased(group.consumer)
    if biased is not None:
        columns = columns_of(reader, units, group.count)
        bias = problem.corrected_bias(torch.zeros_like(problem.weight).index_copy_(1, columns, matrix))
        assert bias is not None
        own = biased.get_parameter("bias")
        own.copy_(bias if biased is reader else own + matrices_of(biased)[0].double() @ bias)
    group.take_(chained.modules, units, matrix)
    for name in group.layers:
        owner = chained.owner(name)
        if isinstance(owner, FactoredModule):
            adopt_sizes_(owner)
        mark_resized(owner)
