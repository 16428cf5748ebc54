"""What a progressive decomposition did, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from ...rank import Budget
from ..recovery import Recovery


@dataclass(frozen=True)
class Stage:
    """One stage of a progressive decomposition: the model was factorized to a budget, and trained.

    Args:
        budget: the limit, as it was asked for.
        params: number of the model's parameters at that size.
        recovery: losses and scores of the training; the first score is that of the model as it was factorized.
    """

    budget: Budget
    params: int
    recovery: Recovery

    @property
    def factorized_score(self) -> float | None:
        """The held-out score before training."""
        return self.recovery.scores[0][1] if self.recovery.scores else None

    @property
    def score(self) -> float | None:
        """The held-out score after it."""
        return self.recovery.score


@dataclass(frozen=True)
class Progression:
    """What :func:`progressive_` did; it prints as a table, and ``plot.progression`` draws it.

    Args:
        params: number of the model's parameters before.
        score: its held-out score before, greater is better; ``None`` where nothing was scored.
        stages: what was done, in order.
        kept: number of stages that the model has behind it; 0 if it is as it was.

    Examples:
        >>> recovery = lr.Recovery(losses=(2.0, 1.0), scores=((0, 0.5), (2, 0.75)), best_step=2)
        >>> print(lr.Progression(1000, 0.8, (lr.Stage(lr.Budget(params=0.3), 290, recovery),), kept=1))
        stage  budget               params    kept  factorized  recovered
            0                        1,000  100.0%                    0.8
            1  Budget(params=0.3)      290   29.0%         0.5       0.75  the model
    """

    params: int
    score: float | None
    stages: tuple[Stage, ...]
    kept: int

    def __str__(self) -> str:
        rows: list[tuple[str, int, float | None, float | None]] = [("", self.params, None, self.score)]
        rows += [(repr(each.budget), each.params, each.factorized_score, each.score) for each in self.stages]
        width = max(len(row[0]) for row in rows)
        lines = [f"stage  {'budget':<{width}}  {'params':>9}    kept  factorized  recovered"]
        for number, (budget, params, *scores) in enumerate(rows):
            before, after = ("" if score is None else f"{score:.4g}" for score in scores)
            mark = "  the model" if number == self.kept else ""
            kept = f"{params / self.params:.1%}"
            lines.append(f"{number:>5}  {budget:<{width}}  {params:>9,}  {kept:>6}  {before:>10}  {after:>9}{mark}")
        return "\n".join(line.rstrip() for line in lines)
