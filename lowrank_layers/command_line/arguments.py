"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import NoReturn

from ..errors import LowRankError
from ..rank import Rank
from ..rank.energy import Energy


class Parser(argparse.ArgumentParser):
    """A parser that raises an error of one line in place of printing how it is used."""

    def error(self, message: str) -> NoReturn:
        """Raises what is wrong with the arguments."""
        raise LowRankError(f"{message} (see {self.prog} --help)")


def add_names(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of layers by name.

    Args:
        parser: the parser of a command.
    """
    text = "regular expression that is searched for in the names of layers; may be given several times"
    parser.add_argument("--include", metavar="REGEX", action="append", default=[], help=f"layers to look at: {text}")
    parser.add_argument("--exclude", metavar="REGEX", action="append", default=[], help="layers to leave alone")


def chosen(names: Iterable[str], args: argparse.Namespace) -> list[str]:
    """Returns the names that are included and not excluded.

    Args:
        names: all names.
        args: arguments with those of :func:`add_names`.

    Raises:
        LowRankError: for a regular expression that is none, or matches no name.
    """
    names = list(names)
    hits: dict[str, set[str]] = {}
    for text in (*args.include, *args.exclude):
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise LowRankError(f"{text!r} is no regular expression: {error}.") from None
        hits[text] = {name for name in names if pattern.search(name)}
        if not hits[text]:
            raise LowRankError(f"{text!r} matches no layer of the file, which has {', '.join(names[:5])}, ...")
    included = set(names).intersection(set().union(*(hits[text] for text in args.include))) if args.include else names
    excluded = set().union(*(hits[text] for text in args.exclude))
    return [name for name in names if name in included and name not in excluded]


def add_size(parser: argparse.ArgumentParser, whole: str) -> argparse._MutuallyExclusiveGroup:
    """Adds ``--rank``, ``--energy`` and ``--budget``, of which one is given.

    Args:
        parser: the parser of a command.
        whole: what the budget is a fraction of, in words.
    """
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="rank of every layer")
    size.add_argument("--energy", type=float, help="fraction of the squared singular values to keep, in (0, 1]")
    size.add_argument("--budget", type=_number, help=f"parameters: a fraction of {whole} (0.5), or a count (1000000)")
    return size


def rank_of(args: argparse.Namespace) -> Rank | None:
    """Returns the rank, or the rule, that was given for every layer.

    Args:
        args: arguments with those of :func:`add_size`.
    """
    rule: Rank | None = args.rank if args.energy is None else Energy(args.energy)
    return rule


def _number(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)
