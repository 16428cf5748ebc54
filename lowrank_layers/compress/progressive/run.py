"""Where a progressive decomposition stands, in memory and on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...calibrate import Loss
from ...errors import LowRankError
from ...files import replacing
from ...modules import Selector
from ...rank import Budget
from ..densify import densify_
from ..method import Method
from ..plan import model_cost
from ..recovery import Recovery, RecoverySettings
from ..recovery.data import Position
from ..recovery.state import read_state
from .further import factorize_further_
from .result import Stage
from .snapshot import model_of, new_optimizer, optimizer_states, snapshot_of

FORMAT = "lowrank_layers.progression"
VERSION = 1
FILE = "progression.pt"


class Run:
    """A model between two stages, or factorized in one and not yet trained.

    Args:
        model: the model, changed in place.
        score: its held-out score.

    Attributes:
        params: number of parameters of the model as it was.
        stages: what is done.
        kept: number of stages that ``good`` has behind it.
        good: the model of the last stage that kept the score; ``None`` before.
        factorized: whether the model is that of the next stage, to be trained.
        optimizer: the optimizer of the model.
    """

    def __init__(self, model: nn.Module, score: float | None) -> None:
        self.model = model
        self.score = score
        self.params = model_cost(model).params
        self.stages: list[Stage] = []
        self.kept = 0
        self.good: nn.Module | None = None
        self.factorized = False
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def position(self) -> Position:
        """Where the data goes on."""
        return self.stages[-1].recovery.position if self.stages else (0, 0)

    def factorize(
        self,
        budget: Budget,
        batches: Sequence[Any],
        curvature: Loss | None,
        methods: Sequence[Method] | None,
        skip: Iterable[Selector],
        settings: RecoverySettings,
    ) -> None:
        """Factorizes the model to the budget of the next stage.

        Args:
            budget: the limit.
            batches: what the model is calibrated on.
            curvature: the loss that weights the layers.
            methods: methods to choose from.
            skip: layers to leave alone.
            settings: those of the next stage.
        """
        optimizer = self.optimizer or new_optimizer(self.model, {}, settings)
        factorize_further_(self.model, budget, batches, curvature, methods, skip, optimizer)
        self.optimizer = new_optimizer(self.model, optimizer_states(self.model, optimizer), settings)
        self.factorized = True

    def finish(self, budget: Budget, recovery: Recovery, tolerated: float | None) -> None:
        """Notes a stage, and keeps its model if the score allows it.

        Args:
            budget: the limit, as it was asked for.
            recovery: the training.
            tolerated: how far the score may fall; ``None`` keeps every stage.
        """
        self.stages.append(Stage(budget, model_cost(self.model).params, recovery))
        if tolerated is not None:
            assert self.score is not None
            assert recovery.score is not None
            if self.score - recovery.score > tolerated:
                return
        self.kept, self.good, self.factorized = len(self.stages), copy.deepcopy(self.model), False

    def write(self, folder: Path, words: Mapping[str, str]) -> None:
        """Writes the model as it was factorized for the next stage, in place of the file before.

        Args:
            folder: the folder; it exists.
            words: what the call was given, as words.
        """
        assert self.optimizer is not None
        body = {
            "format": FORMAT,
            "version": VERSION,
            "settings": dict(words),
            "model": snapshot_of(self.model),
            "optimizer": optimizer_states(self.model, self.optimizer),
            "good": None if self.good is None else snapshot_of(self.good),
            "score": self.score,
            "stages": [{"params": stage.params, "recovery": asdict(stage.recovery)} for stage in self.stages],
        }
        with replacing(folder / FILE) as temporary:
            torch.save(body, temporary)

    @classmethod
    def read(
        cls,
        folder: Path,
        words: Mapping[str, str],
        model: nn.Module,
        budgets: Sequence[Budget],
        settings: Sequence[RecoverySettings],
    ) -> Run | None:
        """Reads what :meth:`write` wrote; ``None`` where nothing was written yet.

        Args:
            folder: the folder; it is made if there is none.
            words: what the call was given, as words.
            model: the model as it is given; not changed.
            budgets: those of all stages.
            settings: those of all stages.

        Raises:
            CheckpointError: for a file that is torn, of another model, or was written by another call.
        """
        if folder.exists() and not folder.is_dir():
            raise LowRankError(f"progressive_: got resume={str(folder)!r}, which is a file; expected a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        body = read_state(folder / FILE, FORMAT, VERSION, "progressive_", words)
        if body is None:
            return None
        dense = densify_(copy.deepcopy(model))
        run = cls(model_of(body["model"], dense), body["score"])
        run.params = model_cost(model).params
        run.good = None if body["good"] is None else model_of(body["good"], dense)
        run.stages = [
            Stage(budget, each["params"], Recovery(**each["recovery"]))
            for budget, each in zip(budgets, body["stages"], strict=False)
        ]
        run.kept = len(run.stages)
        run.factorized = True
        run.optimizer = new_optimizer(run.model, body["optimizer"], settings[len(run.stages)])
        return run
