"""The plan: which layer becomes what, as a value that prints, saves, and can be edited."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..cost import Cost
from ..errors import LowRankError
from ..files import replacing
from ..layers import FactoredModule, is_factored, layer_cost
from ..layers.config import blank, describe
from ..modules import check_factors, check_model, walk_layers
from .candidates import Candidate
from .damping import Damping
from .entry import Entry, read_entry
from .methods import METHODS, Method
from .methods.registry import settings_of

FORMAT = "lowrank_layers.plan"
VERSION = 1


class Plan:
    """Which layers become low-rank, how, and at what rank.

    Args:
        entries: one line a layer that a method matches; those left dense have the method ``"dense"``.
        skipped: name to reason, for layers with a weight that no method touches.
        notes: name to remark, for layers whose line needs one.
        total: cost of the whole dense model.
        settings: how the plan was made.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = lr.make_plan(model, lr.Budget(params=0.6))
        >>> plan.set_rank("0", 8)["0"].rank
        8
        >>> lr.factorize_(model, plan)[0].rank
        8
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def after(self) -> Cost:
        """Cost of the whole model once the plan is applied."""
        return sum((entry.after - entry.before for entry in self), self.total)

    @property
    def damping(self) -> Damping:
        """Ridges on the moments in the statistics: those that it was made with, and that :func:`factorize_` uses."""
        return Damping(**self.settings.get("damping", {}))

    @property
    def time_ratio(self) -> float | None:
        """Estimated time of the planned layers over that of the dense ones; ``None`` where no sizes are known.

        Counts multiply-accumulates and values written, so that it is a warning, not a measurement.
        """
        times = [time for entry in self if (time := entry.time()) is not None]
        dense, planned = (sum(side) for side in zip(*times, strict=True)) if times else (0.0, 0.0)
        return planned / dense if dense else None

    def set_rank(self, name: str, rank: Any, *, method: str | None = None) -> Plan:
        """Changes one layer's rank, in place.

        Args:
            name: the layer.
            rank: an integer (Tucker: one or two) or ``ParameterFraction``.
            method: another method; by default the entry's own, and for a dense layer the first one that matches.

        Returns:
            The plan itself.

        Raises:
            LowRankError: for a layer that is not in the plan, an unknown method or a bad rank; nothing changes.
        """
        entry = self[name]
        dense = blank(entry.layer)
        fits = [m.name for m in METHODS.values() if m.matches(Candidate(dense))]
        if method is None:
            method = entry.method if entry.method != "dense" else fits[0]
        if method not in fits:
            kind = entry.layer["type"]
            raise LowRankError(f"{name!r}: got method {method!r}, expected one of {fits} for this {kind}.")
        self._entries[name] = entry.with_rank(method, rank)
        self.notes.pop(name, None)
        return self

    def drop(self, name: str) -> Plan:
        """Leaves one layer dense, in place; returns the plan itself."""
        entry = self[name]
        self._entries[name] = replace(entry, method="dense", rank=None, after=entry.before, error=0.0, settings={})
        self.notes.pop(name, None)
        return self

    def apply(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """:func:`factorize_` with this plan."""
        from .factorize import factorize_

        return factorize_(model, self, **kwargs)

    @classmethod
    def from_model(cls, model: nn.Module) -> Plan:
        """Reads the plan back off a factored model: ranks and methods of every factored layer.

        Examples:
            >>> model = nn.Sequential(lr.LowRankLinear(64, 32, rank=4))
            >>> lr.Plan.from_model(model)["0"].rank
            4
        """
        check_model(model)
        check_factors(model)
        entries = []
        saved = Cost()
        for name, module in walk_layers(model):
            if not is_factored(module):
                continue
            assert isinstance(module, FactoredModule)
            dense = module.dense_twin()
            method = method_of(module)
            before, after = layer_cost(dense), layer_cost(module)
            saved += before - after
            bias = getattr(module.last, "bias", None) is not None
            entry = Entry(name, method.name, module.rank, before, after, None, describe(dense), bias)
            entries.append(replace(entry, settings=settings_of(method)))
        return cls(entries, total=model_cost(model) + saved)

    def to_json(self) -> str:
        """The plan as versioned JSON."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "total": asdict(self.total),
            "settings": self.settings,
            "entries": [asdict(entry) for entry in self],
            "skipped": self.skipped,
            "notes": self.notes,
        }
        return json.dumps(body, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; under a temporary name first, so that no reader ever sees half a file."""
        if not Path(path).parent.is_dir():
            raise LowRankError(f"Plan.save: the folder {Path(path).parent} does not exist.")
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what :meth:`save` wrote.

        Raises:
            LowRankError: if the file is no plan, torn, or of a newer version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LowRankError(f"{path}: cannot be read as a plan: {error}") from None
        return cls.from_json(text, name=str(path))

    @classmethod
    def from_json(cls, text: str, *, name: str = "plan") -> Plan:
        """The way back of :meth:`to_json`; ``name`` opens the messages."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise LowRankError(f"{name}: is torn or not JSON: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise LowRankError(f"{name}: is not a plan of lowrank_layers (no format {FORMAT!r}).")
        if body.get("version") != VERSION:
            raise LowRankError(f"{name}: has version {body.get('version')!r}, expected {VERSION}; update the package.")
        try:
            plan = cls(
                [read_entry(raw) for raw in body["entries"]],
                skipped=body["skipped"],
                notes=body.get("notes"),  # older files have none
                total=Cost(**body["total"]),
                settings=body["settings"],
            )
            plan.damping  # noqa: B018 - refuses what is no damping
            return plan
        except (KeyError, TypeError, AttributeError, LowRankError) as error:
            raise LowRankError(f"{name}: is damaged: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        rows = [("layer", "method", "rank", "params", "", "MACs", "", "error")]
        for e in self:
            rows.append(
                (
                    e.name,
                    e.method,
                    "" if e.rank is None else "x".join(map(str, e.rank)) if isinstance(e.rank, tuple) else str(e.rank),
                    f"{e.before.params:,}",
                    f"-> {e.after.params:,}",
                    f"{e.before.macs:,}" if e.before.macs else "",
                    f"-> {e.after.macs:,}" if e.before.macs else "",
                    "" if e.error is None else f"{e.error:.1%}",
                )
            )
        after = self.after
        rows.append(
            (
                "whole model",
                "",
                "",
                f"{self.total.params:,}",
                f"-> {after.params:,}",
                f"{self.total.macs:,}" if self.total.macs else "",
                f"-> {after.macs:,}" if self.total.macs else "",
                f"{after.params / self.total.params:.1%} kept" if self.total.params else "",
            )
        )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if k < 2 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines = [line.rstrip() for line in lines]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if (ratio := self.time_ratio) is not None and ratio > 1:
            lines.append(
                f"warning: these layers are estimated to take {ratio:.1f} times the time of the dense ones; measure, or"
                " plan with fewer methods, as in methods=[lr.SVDMethod()]"
            )
        lines += [f"{name}: {note}" for name, note in self.notes.items()]
        lines += [f"{name}: left alone, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        factored = sum(entry.method != "dense" for entry in self)
        sizes = f"{self.total.params:,} -> {self.after.params:,} parameters"
        return f"Plan({factored} of {len(self)} layers factored, {sizes})"


def method_of(module: FactoredModule) -> Method:
    """The method whose layer this is."""
    for method in METHODS.values():
        if type(module) in method.layers and module.form == method.form:
            return method
    raise LowRankError(f"no method builds a {type(module).__name__}{module.form or ''}.")


def model_cost(model: nn.Module) -> Cost:
    """Parameters and bytes of a model, shared ones once."""
    parameters = list(model.parameters())
    return Cost(sum(p.numel() for p in parameters), 0, sum(p.numel() * p.element_size() for p in parameters))
