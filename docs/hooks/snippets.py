"""The Python blocks of a page, run from top to bottom in one namespace, as the reader would run them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Output:
    """What a block printed, and the figures that it drew."""

    text: str
    figures: list[Any] = field(default_factory=list)


def run(markdown: str, page: str) -> list[Output]:
    """Runs the blocks of a page in a temporary folder, and returns what comes out of each."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    before, outputs = os.getcwd(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for code in BLOCK.findall(markdown):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, page, "exec"), scope)
                outputs.append(Output(printed.getvalue().rstrip(), taken_figures()))
        finally:
            os.chdir(before)
    return outputs


def taken_figures() -> list[Any]:
    """The open figures of matplotlib, which are closed."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    pyplot = sys.modules["matplotlib.pyplot"]
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures
