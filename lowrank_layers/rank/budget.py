"""Budgets: limits on size, compute, time and loss of a model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from ..checks import is_number
from ..cost import Cost
from ..errors import BudgetError, LowRankError

UNITS = ("params", "macs", "bytes", "latency")
"""The costs that can be limited."""


@dataclass(frozen=True, repr=False)
class Budget:
    """Limits on the parameters, multiply-accumulates, bytes, latency and loss of a model; all that are given hold.

    With limits on costs alone the loss is the least that they allow. With ``loss`` it is the other way round: the cost
    is the least at which the loss grows no more than that. This cost is the first that is limited as well, so that
    ``Budget(loss=0.1, latency=1.0)`` asks for the fastest model; parameters if none is.

    Args:
        params: a float in (0, 1] is a fraction of what the model has now, an integer is a count.
        macs: likewise for multiply-accumulates per sample; needs calibration statistics, which know the sizes.
        bytes: likewise for the bytes of all parameters, or of what one training step sends
            (:class:`LowRankCommState`).
        latency: a float in (0, 1] is a fraction of the time that the model's forward pass takes now, a ``timedelta`` is
            a time. Layers are timed on the machine and with the number of threads that :func:`make_plan` runs on.
        loss: limit on the predicted growth of the loss per sample, a positive number; needs statistics that were taken
            with a loss. The prediction is quadratic in the errors of the layers and adds them up.
        of: ``"model"`` limits the whole model, ``"planned"`` only the layers that :func:`make_plan` may change, without
            those that are skipped or that no method takes.

    Raises:
        BudgetError: if no limit is given, or one is no fraction in (0, 1], positive integer or time.

    Examples:
        >>> lr.Budget(params=0.3).limits(lr.Cost(params=1000))
        {'params': 300}
        >>> lr.Budget(bytes=4_000_000, macs=0.5).units
        ('macs', 'bytes')
        >>> model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5, of="planned"), skip=["0"])
        >>> sum(entry.after.params for entry in plan) <= 0.5 * sum(entry.before.params for entry in plan)
        True
    """

    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None
    latency: float | timedelta | None = None
    loss: float | None = None
    of: Literal["model", "planned"] = "model"

    def __post_init__(self) -> None:
        if not self.units and self.loss is None:
            raise BudgetError(
                "Budget: got no limit, expected one or more of params, macs, bytes, latency and loss, as in"
                " Budget(params=0.3)."
            )
        for unit in self.units:
            value = getattr(self, unit)
            if unit == "latency":
                _check_latency(value)
            elif not is_number(value) or not (0 < value <= 1 if isinstance(value, float) else value >= 1):
                raise BudgetError(
                    f"Budget: got {unit}={value!r}, expected a fraction in (0, 1] (a float)"
                    " or a positive count (an integer)."
                )
        if self.loss is not None and (not is_number(self.loss) or not 0 < self.loss < float("inf")):
            raise BudgetError(f"Budget: got loss={self.loss!r}, expected a positive number, as in Budget(loss=0.05).")
        if self.of not in ("model", "planned"):
            raise BudgetError(f"Budget: got of={self.of!r}, expected 'model' or 'planned'.")

    def __repr__(self) -> str:
        given = [f"{name}={getattr(self, name)!r}" for name in (*UNITS, "loss") if getattr(self, name) is not None]
        given += [] if self.of == "model" else [f"of={self.of!r}"]
        return f"Budget({', '.join(given)})"

    @property
    def units(self) -> tuple[str, ...]:
        """The fields of :class:`Cost` that are limited."""
        return tuple(unit for unit in UNITS if getattr(self, unit) is not None)

    def limits(self, total: Cost) -> dict[str, int | float]:
        """Returns the limits on costs as counts and seconds.

        Args:
            total: cost of everything that the limits count, as it is now.
        """
        return {unit: _limit(getattr(self, unit), getattr(total, unit)) for unit in self.units}

    def to_dict(self) -> dict[str, Any]:
        """Returns the limits that are given, as JSON can hold them; a time is text, in seconds."""
        values = {name: getattr(self, name) for name in (*UNITS, "loss")}
        if isinstance(self.latency, timedelta):
            values["latency"] = f"{self.latency.total_seconds()} s"
        return {**{name: value for name, value in values.items() if value is not None}, "of": self.of}


def _limit(value: Any, total: float) -> int | float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, float):
        return value * total if isinstance(total, float) else int(value * total)
    count: int = value
    return count


def _check_latency(value: object) -> None:
    fits = value > timedelta(0) if isinstance(value, timedelta) else isinstance(value, float) and 0 < value <= 1
    if not fits:
        raise BudgetError(
            f"Budget: got latency={value!r}, expected a fraction in (0, 1] (a float) or a positive time, as in"
            " latency=timedelta(seconds=0.02)."
        )


def as_budget(budget: object) -> Budget:
    """Raises for anything but a :class:`Budget`, and returns it."""
    if not isinstance(budget, Budget):
        raise LowRankError(f"make_plan: got budget {budget!r}, expected a Budget; write Budget(params={budget!r}).")
    return budget


def one_limit(budget: object, who: str) -> Budget:
    """Raises for anything but a :class:`Budget` with one limit, on a count, and returns it."""
    budget = as_budget(budget)
    if len(budget.units) != 1 or budget.loss is not None or budget.latency is not None:
        raise BudgetError(f"{who}: got {budget}, expected one limit, on params, macs or bytes.")
    return budget


def amount(value: float, unit: str) -> str:
    """A cost or a loss with its unit, as plans and messages show it."""
    if unit == "latency":
        return f"{1e3 * value:.3g} ms"
    return f"loss {value:.3g}" if unit == "loss" else f"{value:,} {unit}"
