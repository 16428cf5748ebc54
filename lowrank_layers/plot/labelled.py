"""What is drawn for each label, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..checks import check_type
from ..errors import LowRankError


def labelled(groups: object, who: str, expected: str) -> dict[Any, list[Any]]:
    """Returns the members of each label as a list, or raises for what is not a dict of lists.

    Args:
        groups: what the user gave.
        who: name of the function, for the message.
        expected: what belongs to a label, for the message.
    """
    message = f"a dict with {expected} for each label"
    check_type(groups, Mapping, who, message)
    assert isinstance(groups, Mapping)
    for each in groups.values():
        check_type(each, Iterable, who, message)
    return {label: list(each) for label, each in groups.items()}


def points_of(curves: object, who: str, expected: str = "points (x, y)") -> dict[str, list[tuple[float, float]]]:
    """Returns the points of each label as pairs of numbers, or raises if there are none.

    Args:
        curves: what the user gave.
        who: name of the function, for the message.
        expected: what belongs to a label, for the message.
    """
    groups = labelled(curves, who, expected)
    if not any(groups.values()):
        raise LowRankError(f"{who}: got no points, expected at least one.")
    try:
        return {label: [(float(x), float(y)) for x, y in points] for label, points in groups.items()}
    except (TypeError, ValueError) as error:
        raise LowRankError(f"{who}: expected a dict with {expected} for each label: {error}.") from None
