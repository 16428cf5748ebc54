"""What commands print: tables and progress for people, JSON for programs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ..errors import MissingExtraError

T = TypeVar("T")


def print_json(values: Any) -> None:
    """Prints values as JSON.

    Args:
        values: what JSON can hold.
    """
    print(json.dumps(values, indent=1))


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, all others to the right.

    Args:
        title: what stands above it.
        head: names of the columns.
        rows: the lines.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(head):
        table.add_column(name, justify="right" if k else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    width = None if sys.stdout.isatty() else 200  # a pipe has no width, and lines must not be folded there
    Console(width=width, highlight=False).print(table)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yields the items behind a progress bar on the terminal's error stream; without a terminal it is not shown.

    Args:
        items: what is worked on.
        description: what is done.
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, description, console=Console(stderr=True), transient=True)


def check_rich() -> None:
    """Raises if tables cannot be printed, before anything is computed.

    Raises:
        MissingExtraError: without rich.
    """
    if importlib.util.find_spec("rich") is None:
        raise MissingExtraError("tables need rich: pip install 'lowrank-layers[cli]', or ask for --json.")
