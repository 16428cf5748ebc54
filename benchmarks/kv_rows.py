"""All rows of benchmarks.kv_real."""

from __future__ import annotations

import argparse
import re
from functools import cached_property

from .kv_ours import Ours
from .kv_peer_rows import Palus, eviction_rows, quantized_rows, rank_row
from .kv_row import EXACT, Row
from .kv_subjects import Subject


class Rows:
    """The rows of a model; what needs calibration is calibrated once, when it is first asked for."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args

    @cached_property
    def palu(self) -> Palus:
        print(f"{self.subject.name}: bases as Palu's", flush=True)
        return Palus(self.subject, self.args)

    @cached_property
    def ours(self) -> Ours:
        print(f"{self.subject.name}: calibration", flush=True)
        return Ours(self.subject, self.args)

    def of(self, prompt: int, more: int) -> list[Row]:
        """The rows for a prompt of so many tokens, and so many after it; the first one is exact."""
        return [
            EXACT,
            *quantized_rows(),
            *eviction_rows(prompt, more),
            *(self.palu.rows() if re.search(self.args.only, "as Palu") else []),
            rank_row(self.subject),
            *self.ours.rows(prompt + more // 2),
        ]

    def brief(self, prompt: int, more: int) -> list[Row]:
        """The rows with which tasks are run, and texts after the first."""
        return [row for row in self.of(prompt, more) if row.brief]
