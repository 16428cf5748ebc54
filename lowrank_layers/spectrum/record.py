"""What a monitor measured at one step, and its form as a line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .leading_spectrum import LeadingSpectrum

Kind = Literal["weights", "gradients", "deltas"]
"""What a matrix is."""


@dataclass(frozen=True)
class SpectrumRecord:
    """The spectra of a model after one optimizer step.

    Args:
        step: number of optimizer steps before the measurement.
        weights: by the parameter's name, such as ``"fc1.weight"``.
        gradients: of the same parameters, as the optimizer used them in this step, so after clipping; those without a
            gradient are missing.
        deltas: of LoRA, ``scaling B A``, by the names of the parameter and the adapter, such as
            ``"fc1.weight/default"``.
    """

    step: int
    weights: dict[str, LeadingSpectrum]
    gradients: dict[str, LeadingSpectrum]
    deltas: dict[str, LeadingSpectrum]

    def items(self) -> Iterator[tuple[str, LeadingSpectrum]]:
        """Every spectrum with its name: ``"weights/fc1.weight"``, ``"gradients/fc1.weight"``, ..."""
        for kind in ("weights", "gradients", "deltas"):
            for name, spectrum in getattr(self, kind).items():
                yield f"{kind}/{name}", spectrum

    def to_json(self) -> str:
        """The record as one line of JSON, in which NaN and Inf are null."""

        def entry(spectrum: LeadingSpectrum) -> dict[str, Any]:
            norms = {"frobenius_norm": spectrum.frobenius_norm, "stable_rank": spectrum.stable_rank}
            finite = {name: value if math.isfinite(value) else None for name, value in norms.items()}
            return {"singular_values": list(spectrum.singular_values), **finite}

        kinds = {"weights": self.weights, "gradients": self.gradients, "deltas": self.deltas}
        body = {kind: {name: entry(own) for name, own in spectra.items()} for kind, spectra in kinds.items()}
        return json.dumps({"step": self.step, **body}, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> SpectrumRecord:
        """Inverse of :meth:`to_json`."""
        fields = json.loads(line)

        def spectra(kind: str) -> dict[str, LeadingSpectrum]:
            return {
                name: LeadingSpectrum(
                    tuple(entry["singular_values"]),
                    math.nan if entry["frobenius_norm"] is None else entry["frobenius_norm"],
                )
                for name, entry in fields[kind].items()
            }

        return cls(fields["step"], spectra("weights"), spectra("gradients"), spectra("deltas"))
