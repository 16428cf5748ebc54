"""Whether a value is the kind of number that an argument asks for; ``True`` and ``False`` are no numbers here."""

from __future__ import annotations

from typing import TypeGuard

from .errors import LowRankError


def is_integer(value: object, least: int) -> TypeGuard[int]:
    """Whether this is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is an integer or a float, possibly infinite or NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_integer(value: object, who: str, name: str, least: int) -> None:
    """Raises unless the value is an integer of at least ``least``.

    Args:
        value: what the argument got.
        who: the function or class that checks its arguments, for the message.
        name: the argument's name, for the message.
        least: the smallest value allowed.

    Raises:
        LowRankError: with the name of the argument, what it got and what was expected.

    Examples:
        >>> from lowrank_layers.checks import check_integer
        >>> check_integer(True, "KVSettings", "block", 1)
        Traceback (most recent call last):
        lowrank_layers.errors.LowRankError: KVSettings: got block=True, expected an integer of at least 1.
    """
    if not is_integer(value, least):
        raise LowRankError(f"{who}: got {name}={value!r}, expected an integer of at least {least}.")
