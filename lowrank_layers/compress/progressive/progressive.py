"""Factorizing a model further and further, with a recovery after each stage."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...calibrate import Loss, Padding, SampledCrossEntropy, check_batches
from ...checks import check_integer, is_number
from ...errors import LowRankError
from ...layers import bits_of
from ...modules import Selector, check_factors, check_model, walk_layers
from ...rank import Budget
from ...settings import settings_from
from ..method import Method
from ..recovery import Distillation, RecoverySettings, recover_
from ..recovery.data import Position, check_data, seeded_batches
from ..recovery.objective import Metric, Objective
from ..recovery.scoring import Score, Scoring, mean_score, samples_of
from ..recovery.state import words_of
from ..registry import refuse_group_methods
from .result import Progression
from .run import Run
from .snapshot import become_


def progressive_(
    model: nn.Module,
    budgets: Sequence[Budget | float],
    settings: RecoverySettings | Sequence[RecoverySettings] | int | None = None,
    *,
    data: Iterable[Any],
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    score: Score | None = None,
    tolerated: float | None = None,
    methods: Sequence[Method] | None = None,
    skip: Iterable[Selector] = (),
    curvature: Loss | Literal["auto"] | None = "auto",
    samples: int = 2000,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **changes: Any,
) -> Progression:
    """Factorizes a model to one budget after the other, in place, and trains it by :func:`recover_` after each.

    Each stage calibrates and plans the trained model anew, factored layers as the dense ones that they stand for, and
    truncates them; the optimizer's moments of what is truncated go on, and so does the data, from the batch at which
    the stage before stopped. With ``tolerated`` the first stage whose held-out score has fallen by more ends it, and
    the model is that of the stage before.

    The stages work on a copy; ``model`` changes at the end, or not at all if an error is raised. With ``resume`` a
    process may be killed at any moment: the same call goes on where it was, and its result is that of a run without an
    interruption, under the conditions that :func:`recover_` names.

    Args:
        model: a trained model, dense or factored; not wrapped.
        budgets: the limits, from the largest to the smallest: :class:`Budget`, or fractions of the parameters; all
            fractions are of the dense model.
        settings: :class:`RecoverySettings` or the number of steps, for all stages alike, or a list with the settings
            of each stage. The optimizer is AdamW.
        data: batches to train on, as in :func:`recover_`.
        loss: the loss, as in :func:`recover_`.
        teacher: the model to imitate, as in :func:`recover_`; a copy of ``model``, most often.
        validation: held-out batches.
        metric: ``metric(output, target) -> number``, a mean over the batch, greater is better; ``None`` is minus the
            objective.
        score: in the place of both, a function of the model, greater is better.
        tolerated: how far the score may fall below that of ``model`` as it is given; ``None`` goes through all budgets.
        methods: methods to choose from, as in :func:`make_plan`.
        skip: layers to leave alone, as in :func:`make_plan`.
        curvature: the loss by which :func:`calibrate` weights layers; ``None`` looks at their inputs only. ``"auto"``
            is :class:`SampledCrossEntropy` where the objective is the cross-entropy or a divergence from the teacher,
            and ``loss`` otherwise.
        samples: number of samples of ``data`` to calibrate on in each stage.
        resume: a folder for the state; it is made if there is none.
        progress: shows progress bars.
        **changes: fields of :class:`RecoverySettings` by name, for all stages.

    Returns:
        The history of the stages; print it, or draw it with ``plot.progression``.

    Raises:
        BudgetError: if not even the smallest options fit a budget.
        LowRankError: for anything wrong with the arguments, and for an objective that is not finite; the model is as it
            was.
        CheckpointError: for a state in ``resume`` that is torn, of another model or by other settings.

    Examples:
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = list(torch.randn(8, 32, 8))
        >>> history = lr.progressive_(
        ...     model, [0.6, 0.3], 40, data=batches, teacher=copy.deepcopy(model), validation=batches, lr=1e-2
        ... )
        >>> history.kept, sum(p.numel() for p in model.parameters()) <= 0.3 * history.params
        (2, True)
    """
    check_model(model)
    refuse_group_methods(methods, "progressive_")
    check_factors(model)
    rounded = next((name for name, module in walk_layers(model) if bits_of(module) is not None), None)
    if rounded is not None:
        raise LowRankError(
            f"progressive_: {rounded!r} is stored in int8, which is not trained; make the model dense first (densify_)."
        )
    limits = _budgets(budgets)
    chosen = _settings(settings, changes, len(limits))
    for name, batches in (("data", data), ("validation", validation)):
        if batches is not None:
            check_batches(batches, "progressive_")
            check_data(batches, name)
    check_integer(samples, "progressive_", "samples", 1)
    scoring = Scoring(validation, metric, score)
    _check_tolerated(tolerated, scoring)
    words = {"budgets": repr(limits), "tolerated": repr(tolerated), "samples": repr(samples)}
    words |= {f"{key} of stage {k}": word for k, each in enumerate(chosen, 1) for key, word in words_of(each).items()}
    folder = None if resume is None else Path(resume)
    run = None if folder is None else Run.read(folder, words, model, limits, chosen)
    if run is None:
        work = copy.deepcopy(model)
        run = Run(work, _score(work, chosen[0], scoring, loss, teacher))
    for stage in range(len(run.stages), len(limits)):
        each = chosen[stage]
        if not run.factorized:
            weight = _curvature(each, loss, teacher) if curvature == "auto" else curvature
            batches = _calibration(data, each.seed, run.position, samples, targets=weight is not None)
            run.factorize(limits[stage], batches, weight, methods, list(skip), each)
            if folder is not None:
                run.write(folder, words)
        recovery = recover_(
            run.model,
            data,
            each,
            loss=loss,
            teacher=teacher,
            validation=validation,
            metric=metric,
            score=score,
            optimizer=run.optimizer,
            start=run.position,
            resume=None if folder is None else folder / f"stage_{stage + 1}",
            progress=progress,
        )
        run.finish(limits[stage], recovery, tolerated)
        if run.kept <= stage:
            break
    if run.good is not None:
        become_(model, run.good)
    return Progression(run.params, run.score, tuple(run.stages), run.kept)


def _budgets(budgets: object) -> list[Budget]:
    """The limits, fractions as those of parameters."""
    if not isinstance(budgets, Sequence) or not budgets or isinstance(budgets, str):
        raise LowRankError(f"progressive_: got budgets={budgets!r}, expected a list such as [0.5, 0.3, 0.1].")
    return [each if isinstance(each, Budget) else Budget(params=each) for each in budgets]


def _settings(given: object, changes: dict[str, Any], count: int) -> list[RecoverySettings]:
    """The settings of each stage."""
    each = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(each) != count:
        raise LowRankError(f"progressive_: got {len(each)} settings for {count} budgets, expected one for each.")
    return [settings_from(RecoverySettings, one, changes, "progressive_") for one in each]


def _check_tolerated(tolerated: object, scoring: Scoring) -> None:
    if tolerated is None:
        return
    if not is_number(tolerated) or not tolerated >= 0:
        raise LowRankError(f"progressive_: got tolerated={tolerated!r}, expected a number of at least 0.")
    if not scoring:
        raise LowRankError("progressive_: got tolerated= and nothing to score, expected validation= or score= too.")


def _curvature(settings: RecoverySettings, loss: Loss | None, teacher: nn.Module | None) -> Loss | None:
    """The loss that layers are weighted by; a new one each time, since the labels that it draws depend on its past."""
    predicts = loss is None if teacher is None else settings.distance == "kl"
    return SampledCrossEntropy(class_dim=settings.class_dim) if predicts else loss


def _calibration(data: Iterable[Any], seed: int, position: Position, samples: int, *, targets: bool) -> list[Any]:
    """The next batches of the data, as :func:`calibrate` takes them."""
    found, count = [], 0
    with torch.random.fork_rng([]):
        for _, batch in islice(seeded_batches(data, seed, 0, position), samples):
            found.append(batch[:-1] if isinstance(batch, (tuple, list)) and not targets else batch)
            count += samples_of(batch)
            if count >= samples:
                break
    return found


def _score(
    model: nn.Module, settings: RecoverySettings, scoring: Scoring, loss: Loss | None, teacher: nn.Module | None
) -> float | None:
    """The held-out score of the model as it is given."""
    distillation = None if teacher is None else Distillation(model, teacher, settings)
    padding = Padding(model) if distillation is None else distillation.padding
    objective = Objective(loss, distillation, settings.class_dim)
    with padding if distillation is None else distillation:
        sums = scoring.sums(model, objective, padding, settings.dtype)
    return None if sums is None else mean_score(*sums)
