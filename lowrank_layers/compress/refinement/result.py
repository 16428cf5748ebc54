"""What a refinement did, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RefinedStage:
    """One stage of a refinement.

    Args:
        name: its name.
        before: its error on held-out batches, over that of giving the mean output, before it was trained.
        after: the same of the state that was kept.
        epoch: number of epochs of that state; 0 is the state before.
    """

    name: str
    before: float
    after: float
    epoch: int


@dataclass(frozen=True)
class Refinement:
    """What :func:`refine_` did; it prints as a table.

    Args:
        stages: the stages that were trained, in forward order.
        before: distance of the model's outputs from those of the dense model on held-out batches, before.
        after: the same behind all stages, with the parameters mixed as the settings say.
        kept: whether the model was kept; otherwise it is as it was before.

    Examples:
        >>> print(lr.Refinement((lr.RefinedStage("layers.0", 0.25, 0.2, 2),), before=1.5, after=1.25, kept=True))
        stage           before     after  epoch
        layers.0          0.25       0.2      2
        output             1.5      1.25   kept
    """

    stages: tuple[RefinedStage, ...]
    before: float
    after: float
    kept: bool

    def __str__(self) -> str:
        width = max([12, *(len(stage.name) for stage in self.stages)])
        rows = [(stage.name, stage.before, stage.after, str(stage.epoch)) for stage in self.stages]
        rows.append(("output", self.before, self.after, "kept" if self.kept else "undone"))
        lines = [f"{'stage':<{width}}{'before':>10}{'after':>10}  epoch"]
        lines += [f"{name:<{width}}{before:>10.4g}{after:>10.4g}{end:>7}" for name, before, after, end in rows]
        return "\n".join(lines)
