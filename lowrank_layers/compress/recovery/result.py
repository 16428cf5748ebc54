"""What a recovery did: its losses and held-out scores."""

from __future__ import annotations

from dataclasses import dataclass

_ROWS = 20


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover_` did; it prints as a table, and ``plot.recovery`` draws it.

    Args:
        losses: the objective of every step.
        scores: number of steps done and held-out score, greater is better; empty where nothing was scored.
        best_step: number of steps of the state that the model has now.
        position: epoch, and number of batches of it that are done; another recovery takes it as ``start``.

    Examples:
        >>> print(lr.Recovery(losses=(2.0, 1.0), scores=((0, 0.5), (2, 0.75)), best_step=2))
         step        loss   score
            0               0.5
            2         1.5   0.75  kept
    """

    losses: tuple[float, ...]
    scores: tuple[tuple[int, float], ...]
    best_step: int
    position: tuple[int, int] = (0, 0)

    @property
    def score(self) -> float | None:
        """The held-out score of the state that the model has now."""
        return dict(self.scores).get(self.best_step)

    def __str__(self) -> str:
        scores = dict(self.scores)
        size = max(1, -(-len(self.losses) // _ROWS))
        marks = sorted(scores) if scores else [*range(size, len(self.losses), size), len(self.losses)]
        lines, before = [f"{'step':>5}{'loss':>12}   score"], 0
        for step in marks:
            part = self.losses[before:step]
            loss = f"{sum(part) / len(part):.4g}" if part else ""
            score = f"{scores[step]:.4g}" if step in scores else ""
            lines.append(f"{step:>5}{loss:>12}   {score:<11}{'kept' if step == self.best_step else ''}".rstrip())
            before = step
        return "\n".join(lines)
