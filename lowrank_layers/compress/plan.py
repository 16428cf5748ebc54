"""A plan: which layer becomes what, to be printed, edited, stored and applied."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate.statistics import Statistics
from ..cost import Cost
from ..errors import LowRankError
from ..files import replacing
from ..layers import FactoredModule, bits_of, buffer_bytes, codes, is_compressed, layer_cost
from ..layers.config import blank
from ..modules import ModelDescription, check_factors, check_model, walk_layers
from .candidates import Candidate
from .entry import Entry, read_entry
from .factorize import factorize_
from .grouped import check_units
from .method import Method
from .planned_layers import PlannedLayers
from .registry import DENSE, METHODS, settings_of

FORMAT = "lowrank_layers.plan"
VERSION = 1


class Plan(PlannedLayers):
    """Which layers become low-rank, how, and at what rank.

    Args:
        entries: one entry per layer that a method matches; those left dense have the method ``"dense"``.
        skipped: name to reason, for layers with a weight that no method touches.
        notes: name to remark, for layers whose entry needs one.
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def set_rank(self, name: str, rank: Any, *, method: str | None = None) -> Plan:
        """Changes one layer's rank, in place; of a group of layers the number of units that stay in all of them.

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
        if entry.is_grouped:
            return self._set_units(entry, rank, method)
        dense = blank(entry.layer)
        fits = [m.name for m in METHODS.values() if m.matches(Candidate(dense))]
        if method is None:
            method = entry.method if entry.method != DENSE else fits[0]
        if method not in fits:
            kind = entry.layer["type"]
            raise LowRankError(f"{name!r}: got method {method!r}, expected one of {fits} for this {kind}.")
        self._entries[name] = entry.with_rank(method, rank)
        self._forget(name)
        return self

    def set_bits(self, name: str, bits: int | None) -> Plan:
        """Stores one layer, or its factors, in int8, or in floating point again, in place.

        Args:
            name: the layer.
            bits: 8, or ``None`` for floating point.

        Returns:
            The plan itself.

        Raises:
            LowRankError: for a layer that is not in the plan or cannot be stored in int8; nothing changes.

        Examples:
            >>> plan = lr.make_plan(nn.Sequential(nn.Linear(64, 64)), rank=8, methods=[lr.PivotMethod()])
            >>> plan.set_bits("0", 8)["0"].label
            'pivot int8'
        """
        try:
            self._entries[name] = self[name].with_bits(bits)
        except LowRankError as error:
            raise LowRankError(f"{name!r}: {error}") from None
        self._forget(name)
        return self

    def drop(self, name: str) -> Plan:
        """Leaves one layer dense and in floating point, in place; of a group all of its layers.

        Args:
            name: the layer.

        Returns:
            The plan itself.
        """
        entry = self[name]
        group = entry.group if entry.is_grouped else None
        for each in (name,) if group is None else group.layers:
            own = self[each]
            self._entries[each] = replace(
                own, method=DENSE, rank=None, after=own.before, error=0.0, settings={}, loss=0.0, bits=None
            )
            self._forget(each)
            if group is not None and each not in group.planned:
                del self._entries[each]
        return self

    def _set_units(self, entry: Entry, rank: Any, method: str | None) -> Plan:
        """Changes how many units stay in all layers of a group."""
        name, group = entry.name, entry.group
        if method not in (None, entry.method):
            raise LowRankError(
                f"{name!r}: got method {method!r} for a layer that the method {entry.method!r} changes together with"
                f" others, expected no other one; drop({name!r}) from the plan first."
            )
        check_units(group, rank, name)
        for changed in [self[each].with_rank(entry.method, rank) for each in group.layers]:
            exact = changed.name not in group.leaders
            self._entries[changed.name] = replace(changed, error=0.0, loss=0.0) if exact else changed
            self._forget(changed.name)
        return self

    def _forget(self, name: str) -> None:
        """Drops what an edit of a layer has made untrue."""
        self.notes.pop(name, None)
        self.settings.pop("measured", None)

    def apply(
        self,
        model: nn.Module,
        stats: Statistics | None = None,
        data: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        progress: bool = False,
    ) -> nn.Module:
        """Factorizes a model as this plan says, in place: :func:`factorize_` with this plan, which says more.

        Args:
            model: the model that the plan was made for.
            stats: what :func:`calibrate` returned for it.
            data: batches; with them each layer is fitted on what the compressed layers before it deliver.
            optimizer: the optimizer of the model, which is given the new parameters.
            progress: shows a progress bar.
        """
        return factorize_(model, self, stats, data, optimizer, progress=progress)

    @classmethod
    def from_model(cls, model: nn.Module) -> Plan:
        """Reads the plan back off a factored model: ranks and methods of every factored layer.

        Args:
            model: a model with factored layers.

        Examples:
            >>> model = nn.Sequential(lr.LowRankLinear(64, 32, rank=4))
            >>> lr.Plan.from_model(model)["0"].rank
            4
        """
        check_model(model)
        check_factors(model)
        entries = []
        for name, spec in ModelDescription.of(model).layers.items():
            layer = model.get_submodule(name)
            before, after = layer_cost(blank(spec.dense)), layer_cost(layer)
            entry = Entry(name, DENSE, None, before, after, None, spec.dense, spec.bias, bits=bits_of(layer))
            if isinstance(layer, FactoredModule):
                method = method_of(layer)
                entry = replace(entry, method=method.name, rank=spec.rank, settings=settings_of(method))
            entries.append(entry)
        saved = sum((entry.before - entry.after for entry in entries), Cost())
        return cls(entries, total=model_cost(model) + saved)

    def to_json(self) -> str:
        """Returns the plan as versioned JSON."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "total": asdict(self.total),
            "settings": self.settings,
            "entries": [_plain(entry) for entry in self],
            "skipped": self.skipped,
            "notes": self.notes,
        }
        return json.dumps(body, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, under a temporary name first, so that no reader ever sees half a file.

        Args:
            path: the file.
        """
        if not Path(path).parent.is_dir():
            raise LowRankError(f"Plan.save: the folder {Path(path).parent} does not exist.")
        with replacing(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.

        Raises:
            LowRankError: if the file is no plan, torn, or of a newer version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LowRankError(f"{path}: cannot be read as a plan: {error}.") from None
        return cls.from_json(text, name=str(path))

    @classmethod
    def from_json(cls, text: str, *, name: str = "plan") -> Plan:
        """Inverse of :meth:`to_json`.

        Args:
            text: the JSON.
            name: where it comes from, for messages.

        Raises:
            LowRankError: if the text is no plan, damaged, or of a newer version.
        """
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
                notes=body["notes"],
                total=Cost(**body["total"]),
                settings=body["settings"],
            )
            plan.damping  # noqa: B018 - raises for what is no damping
            return plan
        except LowRankError as error:
            raise LowRankError(f"{name}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise LowRankError(f"{name}: is damaged: {type(error).__name__}: {error}") from None


def _plain(entry: Entry) -> dict[str, Any]:
    """The fields of an entry, without bits where it has none."""
    return {key: value for key, value in asdict(entry).items() if key != "bits" or value is not None}


def method_of(module: FactoredModule) -> Method:
    """Returns the registered method that builds such a layer."""
    for method in METHODS.values():
        if type(module) in method.layers and module.form == method.form:
            return method
    raise LowRankError(f"no method builds a {type(module).__name__}{module.form or ''}.")


def model_cost(model: nn.Module) -> Cost:
    """Returns parameters and bytes of a model, shared ones once; of buffers those of layers of this library count."""
    parameters = list(model.parameters())
    buffers = sum(buffer_bytes(module) for _, module in walk_layers(model) if is_compressed(module))
    numbers = sum(p.numel() for p in parameters) + codes(model)
    return Cost(numbers, 0, sum(p.numel() * p.element_size() for p in parameters) + buffers)
