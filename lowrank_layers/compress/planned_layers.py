"""The lines of a plan and what they cost: as much of a plan as it takes to print and to apply it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..cost import Cost
from ..errors import LowRankError
from ..rank import amount
from .damping import Damping
from .entry import Entry
from .registry import DENSE

_HEAD = ("layer", "method", "rank", "params", "", "MACs", "", "error")


class PlannedLayers:
    """What every layer of a model becomes, and what that costs; :class:`Plan` can be edited, stored and applied.

    Args:
        entries: one entry per layer that a method matches; those left dense have the method ``"dense"``.
        skipped: name to reason, for layers with a weight that no method touches.
        notes: name to remark, for layers whose entry needs one.
        total: cost of the whole dense model.
        settings: how the plan was made.
    """

    def __init__(
        self,
        entries: list[Entry],
        *,
        skipped: dict[str, str] | None = None,
        notes: dict[str, str] | None = None,
        total: Cost | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self.skipped = dict(skipped or {})
        self.notes = dict(notes or {})
        self.total = total or sum((entry.before for entry in entries), Cost())
        self.settings = dict(settings or {})

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            reason = f"; it was skipped: {self.skipped[name]}" if name in self.skipped else ""
            raise LowRankError(f"the plan has no layer {name!r}{reason}. It has {', '.join(self._entries)}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def after(self) -> Cost:
        """Cost of the whole model once the plan is applied."""
        return sum((entry.after - entry.before for entry in self), self.total)

    @property
    def damping(self) -> Damping:
        """Ridges on the moments in the statistics: those that it was made with, and that :func:`factorize_` uses."""
        return Damping(**self.settings.get("damping", {}))

    @property
    def effects(self) -> dict[str, float]:
        """Measured over predicted loss of layers and groups, where that is known; ``make_plan(effects=)`` takes it."""
        return dict(self.settings.get("effects", {}))

    @property
    def loss(self) -> float | None:
        """Predicted growth of the loss, the sum over layers; ``None`` where it is not known."""
        losses = [entry.loss for entry in self if entry.name not in self.notes]
        return None if None in losses or not losses else sum(loss for loss in losses if loss is not None)

    def achieved(self) -> dict[str, tuple[float, float | None]]:
        """Returns each limit of the budget and what the plan has of it: counts, seconds, growth of the loss."""
        after = self.after
        if self.settings.get("budget", {}).get("of") == "planned":
            after = sum((entry.after for entry in self), Cost())
        found: dict[str, tuple[float, float | None]] = {}
        for unit, limit in self.settings.get("limits", {}).items():
            if unit == "latency" and any(entry.error is None for entry in self):  # an edit has no measured time
                found[unit] = (limit, None)
            else:
                found[unit] = (limit, self.loss if unit == "loss" else getattr(after, unit))
        return found

    @property
    def time_ratio(self) -> float | None:
        """Time of the planned layers over that of the dense ones; ``None`` where no sizes are known.

        It is measured under a limit on latency. Otherwise it counts multiply-accumulates and values written, so that it
        is a warning, not a measurement.
        """
        times = [time for entry in self if (time := entry.time()) is not None]
        dense, planned = (sum(side) for side in zip(*times, strict=True)) if times else (0.0, 0.0)
        return planned / dense if dense else None

    def __str__(self) -> str:
        after = self.after
        kept = f"{after.params / self.total.params:.1%} kept" if self.total.params else ""
        rows = [_HEAD, *map(_row, self), ("whole model", "", "", *_costs(self.total, after), kept)]
        lines = _aligned(rows)
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if limits := self.achieved():
            found = [
                f"{'unknown' if have is None else amount(have, unit)} of at most {amount(limit, unit)}"
                for unit, (limit, have) in limits.items()
            ]
            lines.append(f"limits: {'; '.join(found)}")
        if (measured := self.settings.get("measured")) is not None:
            times = [("predicted", after.latency), ("measured", measured)]
            parts = [f"{word} {amount(time, 'latency')} ({time / self.total.latency:.1%})" for word, time in times]
            lines.append(f"latency: dense {amount(self.total.latency, 'latency')}, {', '.join(parts)}")
        if (ratio := self.time_ratio) is not None and ratio > 1:
            lines.append(
                f"warning: these layers are estimated to take {ratio:.1f} times the time of the dense ones; measure, or"
                " plan with fewer methods, as in methods=[lr.SVDMethod()]"
            )
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        lines += [f"{name}: left alone, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        factored = sum(entry.method != DENSE for entry in self)
        rounded = sum(entry.bits is not None for entry in self)
        int8 = f"{rounded} in int8, " if rounded else ""
        sizes = f"{self.total.params:,} -> {self.after.params:,} parameters"
        return f"{type(self).__name__}({factored} of {len(self)} layers factored, {int8}{sizes})"


def _row(entry: Entry) -> tuple[str, ...]:
    rank = "x".join(map(str, entry.rank)) if isinstance(entry.rank, tuple) else str(entry.rank or "")
    error = "" if entry.error is None else f"{entry.error:.1%}"
    return entry.name, entry.label, rank, *_costs(entry.before, entry.after), error


def _costs(before: Cost, after: Cost) -> tuple[str, ...]:
    """Parameters, and MACs where they are known."""
    macs = (f"{before.macs:,}", f"-> {after.macs:,}") if before.macs else ("", "")
    return f"{before.params:,}", f"-> {after.params:,}", *macs


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The rows as lines: the first two columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'<' if k < 2 else '>'}{width}}}" for k, width in enumerate(widths))
    return [template.format(*row).rstrip() for row in rows]
