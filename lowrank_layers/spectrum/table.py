"""Results as aligned tables of text."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns rows under a head and a rule: the first column to the left, all others to the right."""
    every = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    template = "  ".join(f"{{:{'>' if k else '<'}{width}}}" for k, width in enumerate(widths))
    lines = [template.format(*row).rstrip() for row in every]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def shown(value: float | None, digits: int = 3) -> str:
    """Returns a number to be read in a table; nothing where it is not known."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if _plain(value) else f"{value:.2e}"


def _plain(value: float) -> bool:
    return 1e-3 <= abs(value) < 1e6


def percent(value: float) -> str:
    """Returns a fraction in percent."""
    return f"{value:.1%}"
