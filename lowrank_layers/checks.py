"""Checks of arguments: numbers, of which ``True`` and ``False`` are none, and types."""

from __future__ import annotations

from typing import TypeGuard

from .errors import LowRankError


def is_integer(value: object, least: int) -> TypeGuard[int]:
    """Returns whether the value is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether the value is an integer or a float, possibly infinite or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(value: object, who: str, name: str, least: int) -> None:
    """Raises unless the value is an integer of at least ``least``.

    Args:
        value: the value of the argument.
        who: name of the function or class whose argument it is, for the message.
        name: name of the argument, for the message.
        least: the smallest allowed value.

    Raises:
        LowRankError: if the value is anything else.

    Examples:
        >>> from lowrank_layers.checks import check_integer
        >>> check_integer(True, "KVSettings", "block", 1)
        Traceback (most recent call last):
        lowrank_layers.errors.LowRankError: KVSettings: got block=True, expected an integer of at least 1.
    """
    if not is_integer(value, least):
        raise LowRankError(f"{who}: got {name}={value!r}, expected an integer of at least {least}.")


def check_type(value: object, kind: type | tuple[type, ...], who: str, expected: str) -> None:
    """Raises unless the value is an instance of a class.

    Args:
        value: the value of the argument.
        kind: the class, or several.
        who: name of the function whose argument it is, for the message.
        expected: what the function expects, in words.

    Raises:
        LowRankError: if the value is anything else.

    Examples:
        >>> from lowrank_layers.checks import check_type
        >>> check_type([2.0], dict, "losses", "a dict of losses for each label")
        Traceback (most recent call last):
        lowrank_layers.errors.LowRankError: losses: got list, expected a dict of losses for each label.
    """
    if not isinstance(value, kind):
        raise LowRankError(f"{who}: got {type(value).__name__}, expected {expected}.")
