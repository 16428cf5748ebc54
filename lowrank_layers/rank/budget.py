"""Budgets on model size or compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import is_number
from ..cost import Cost
from ..errors import BudgetError, LowRankError

_UNITS = ("params", "macs", "bytes")


@dataclass(frozen=True, repr=False)
class Budget:
    """A limit on the parameters, the multiply-accumulates or the bytes of a model.

    Args:
        params: a float in (0, 1] is a fraction of what the model has now, an integer is a count.
        macs: likewise for multiply-accumulates per sample; needs calibration statistics, which know the sizes.
        bytes: likewise for the bytes of all parameters, or of what one training step sends
            (:class:`LowRankCommState`).
        of: ``"model"`` limits the whole model, ``"planned"`` only the layers that :func:`make_plan` may change, without
            those that are skipped or that no method takes.

    Raises:
        BudgetError: unless exactly one limit is given, and is a fraction in (0, 1] or a positive integer.

    Examples:
        >>> lr.Budget(params=0.3).limit(lr.Cost(params=1000))
        300
        >>> lr.Budget(bytes=4_000_000).unit
        'bytes'
        >>> model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5, of="planned"), skip=["0"])
        >>> sum(entry.after.params for entry in plan) <= 0.5 * sum(entry.before.params for entry in plan)
        True
    """

    params: float | int | None = None
    macs: float | int | None = None
    bytes: float | int | None = None
    of: Literal["model", "planned"] = "model"

    def __post_init__(self) -> None:
        given = [unit for unit in _UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            raise BudgetError(
                f"Budget: got {len(given)} limits, expected exactly one of params, macs and bytes,"
                " as in Budget(params=0.3)."
            )
        value = getattr(self, given[0])
        if not is_number(value) or not (0 < value <= 1 if isinstance(value, float) else value >= 1):
            raise BudgetError(
                f"Budget: got {given[0]}={value!r}, expected a fraction in (0, 1] (a float)"
                " or a positive count (an integer)."
            )
        if self.of not in ("model", "planned"):
            raise BudgetError(f"Budget: got of={self.of!r}, expected 'model' or 'planned'.")

    def __repr__(self) -> str:
        of = "" if self.of == "model" else f", of={self.of!r}"
        return f"Budget({self.unit}={getattr(self, self.unit)!r}{of})"

    @property
    def unit(self) -> str:
        """The field of :class:`Cost` that is limited."""
        return next(unit for unit in _UNITS if getattr(self, unit) is not None)

    def limit(self, total: Cost) -> int:
        """The limit as a count.

        Args:
            total: cost of everything that the limit counts, as it is now.
        """
        value = getattr(self, self.unit)
        return int(value * getattr(total, self.unit)) if isinstance(value, float) else value


def as_budget(budget: object) -> Budget:
    """Raises for anything but a :class:`Budget`, and returns it."""
    if not isinstance(budget, Budget):
        raise LowRankError(f"make_plan: got budget {budget!r}, expected a Budget; write Budget(params={budget!r}).")
    return budget
