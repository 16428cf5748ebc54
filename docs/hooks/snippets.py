"""The blocks ``python`` and ``console`` of a page, run from top to bottom, as the reader would run them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Output:
    """What a block printed, and the figures that it drew."""

    text: str
    figures: list[Any] = field(default_factory=list)


def run(markdown: str, page: str) -> list[Output]:
    """Runs the blocks of a page in a temporary folder, and returns what comes out of each.

    Python blocks share their names. Each line of a ``console`` block is a call of the program ``lowrank``.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    before, outputs = os.getcwd(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for language, code in BLOCK.findall(markdown):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    if language == "python":
                        exec(compile(code, page, "exec"), scope)
                    else:
                        call_lowrank(code)
                outputs.append(Output(printed.getvalue().rstrip(), taken_figures()))
        finally:
            os.chdir(before)
    return outputs


def call_lowrank(lines: str) -> None:
    """Runs lines of the form ``$ lowrank COMMAND ...`` in this process."""
    from lowrank_layers.command_line import main

    for line in lines.splitlines():
        prompt, program, *arguments = shlex.split(line)
        if (prompt, program) != ("$", "lowrank") or main(arguments) != 0:
            raise RuntimeError(f"cannot run {line!r}")


def taken_figures() -> list[Any]:
    """The open figures of matplotlib, which are closed."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    pyplot = sys.modules["matplotlib.pyplot"]
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures
