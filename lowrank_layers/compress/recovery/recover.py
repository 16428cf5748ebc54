"""Fine-tuning a compressed model, by labels or by a teacher, with the best state kept."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...calibrate import Loss, Padding, check_batches
from ...checks import check_integer
from ...errors import LowRankError
from ...modules import check_model, check_optimizer
from ...settings import settings_from
from .data import Position, check_data, seeded_batches
from .distillation import Distillation, unwrapped
from .objective import Metric, Objective, device_of
from .result import Recovery
from .scoring import Score, Scoring, mean_score
from .settings import RecoverySettings
from .state import Log, load_state, save_state, state_of, write_state_
from .training import Training, trained_parameters


def recover_(
    model: nn.Module,
    data: Iterable[Any],
    settings: RecoverySettings | int | None = None,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    validation: Iterable[Any] | None = None,
    metric: Metric | None = None,
    score: Score | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    start: Position = (0, 0),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **changes: Any,
) -> Recovery:
    """Trains a compressed model in place, by a loss, a teacher's outputs or both, and keeps the best state.

    With ``validation`` or ``score`` the model is scored before the first step and then again and again, and ends in the
    state of the best score, so that by this score it never gets worse.

    With ``resume`` the state is written every ``save_every`` steps. The same call, with a model built and compressed in
    the same way, goes on from there if the process is killed at any moment, and its result is that of a run without an
    interruption, bit for bit on one device. For this ``data`` has to give the same batches in every pass, or draw what
    is random (order, augmentation) by torch's generators, which are seeded: a list and a shuffled
    ``DataLoader`` do. A ``metric`` or ``score`` has to be deterministic too.

    A model in :class:`torch.nn.parallel.DistributedDataParallel` is trained on the ``data`` of each process; scores are
    means over all processes, the first one writes the state, and all end with the same parameters.

    Args:
        model: the model; it is trained in train mode, and in the end every module has its own mode again.
        data: batches, to be read again in every epoch: tensors, tuples ``(inputs..., target)`` or dicts of keyword
            arguments (their ``"labels"`` are the target).
        settings: :class:`RecoverySettings`, or the number of steps.
        loss: ``loss(output, target) -> scalar``, averaged over the batch; one with an argument ``mask`` is given the
            mask of the output. ``None`` is the cross-entropy, or the loss that the model itself returns, if there is no
            teacher, and distillation alone if there is one.
        teacher: the model to imitate, such as a copy of the dense one; see :class:`Distillation`.
        validation: held-out batches.
        metric: ``metric(output, target) -> number``, a mean over the batch, greater is better; ``None`` is minus the
            objective.
        score: in the place of both, a function of the model, greater is better, such as success over episodes.
        optimizer: an optimizer of the model's parameters, whose own learning rates are the greatest ones; ``None`` is
            AdamW by the settings.
        start: epoch, and number of its batches to leave out, at which the data begins: the ``position`` of a recovery
            before this one, by the same seed.
        resume: a folder for the state; it is made if there is none.
        progress: shows a progress bar.
        **changes: fields of :class:`RecoverySettings` by name.

    Returns:
        The history of losses and scores; print it, or draw it with ``plot.recovery``.

    Raises:
        LowRankError: for anything wrong with the arguments, before the model changes; and for an objective that is not
            finite, with the model in the best state so far, if it was scored.
        CheckpointError: for a state in ``resume`` that is torn, of another model or by other settings.

    Examples:
        >>> import copy
        >>> dense = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> model = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, lr.Budget(params=0.5)))
        >>> batches = list(torch.randn(8, 32, 8))
        >>> recovery = lr.recover_(model, batches, teacher=dense, steps=40, lr=1e-2, validation=batches)
        >>> recovery.score > recovery.scores[0][1]
        True
    """
    chosen = settings_from(RecoverySettings, settings, changes, "recover_")
    inner = check_model(unwrapped(model), quantized=True)
    check_optimizer(optimizer, "recover_")
    for name, batches in (("data", data), ("validation", validation)):
        if batches is not None:
            check_batches(batches, "recover_")
            check_data(batches, name)
    if loss is not None and not callable(loss):
        raise LowRankError(f"recover_: got loss of type {type(loss).__name__}, expected a function.")
    scoring = Scoring(validation, metric, score)
    if chosen.patience is not None and not scoring:
        raise LowRankError("recover_: got patience= and nothing to score, expected validation= or score= too.")
    trained = trained_parameters(model, chosen, optimizer, "recover_")
    distillation = None if teacher is None else Distillation(inner, teacher, chosen)
    padding = Padding(inner) if distillation is None else distillation.padding
    objective = Objective(loss, distillation, chosen.class_dim)
    training = Training(model, chosen, objective, padding, trained, optimizer)
    processes = training.processes
    state, log = state_of(inner, trained), Log(_checked(start))
    folder = None if resume is None else Path(resume)
    found = None if folder is None else processes.from_first(lambda: _open(folder, chosen, state))
    if found is not None:
        training.load_state_dict(found)
        write_state_(state, found["state"])
        log = Log(**found["log"])

    def held_out() -> float | None:
        sums = scoring.sums(inner, objective, padding, chosen.dtype)
        if sums is None:
            return None
        total, count = processes.sums(sums, device_of(inner))
        return mean_score(total, count)

    def finish_step() -> None:
        """Scores and writes the state behind a step, where it is time."""
        log.finished = log.step == chosen.steps
        if chosen.is_due(log.step) or (folder is not None and log.step % chosen.save_every == 0):
            processes.copy_from_first_(inner.buffers())
        if chosen.is_due(log.step) and (value := held_out()) is not None:
            log.add_score(value, state_of(inner, trained))
            log.finished |= chosen.patience is not None and log.stale >= chosen.patience
        if folder is not None and (log.finished or log.step % chosen.save_every == 0) and processes.rank == 0:
            save_state(folder, chosen, log, state_of(inner, trained), training.state_dict())

    with ExitStack() as stack:
        stack.enter_context(training.running())
        stack.enter_context(padding if distillation is None else distillation)
        stack.callback(_keep_best_, inner, trained, log)
        bar = stack.enter_context(
            tqdm(total=chosen.steps, initial=log.step, desc="recover", disable=not progress or processes.rank > 0)
        )
        steps = _grouped(seeded_batches(data, chosen.seed, processes.rank, log.position), chosen.accumulate)
        if found is None:
            finish_step()
        while not log.finished:
            log.position, batches = next(steps)
            log.losses.append(training.step(batches, log.step))
            finish_step()
            bar.update()
            bar.set_postfix(loss=f"{log.losses[-1]:.4g}", refresh=False)
    best_step = log.step if log.best_step is None else log.best_step
    return Recovery(tuple(log.losses), tuple(log.scores), best_step, log.position)


def _checked(start: object) -> Position:
    """The position that is meant; raises if it is none."""
    if not isinstance(start, (tuple, list)) or len(start) != 2:
        raise LowRankError(f"recover_: got start={start!r}, expected (epoch, batches), as in start=recovery.position.")
    check_integer(start[0], "recover_", "start[0]", 0)
    check_integer(start[1], "recover_", "start[1]", 0)
    return start[0], start[1]


def _open(folder: Path, settings: RecoverySettings, state: dict[str, Tensor]) -> dict[str, Any] | None:
    """The state in a folder that may have to be made."""
    if folder.exists() and not folder.is_dir():
        raise LowRankError(f"recover_: got resume={str(folder)!r}, which is a file; expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return load_state(folder, settings, state)


def _grouped(batches: Iterator[tuple[Position, Any]], size: int) -> Iterator[tuple[Position, list[Any]]]:
    """Groups of batches, each with the position behind its last one."""
    while True:
        group = list(islice(batches, size))
        yield group[-1][0], [batch for _, batch in group]


def _keep_best_(model: nn.Module, trained: dict[str, nn.Parameter], log: Log) -> None:
    if log.best is not None:
        write_state_(state_of(model, trained), log.best)
