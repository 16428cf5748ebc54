"""Settings that a function takes as one value or, for short, as keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from .errors import LowRankError

S = TypeVar("S")


def settings_from(kind: type[S], given: object, changes: Mapping[str, Any], who: str) -> S:
    """The settings that a call means, as in ``f(settings)``, ``f(settings, block=32)``, ``f(16)`` or ``f(rank=16)``.

    A function that takes settings declares ``settings: Settings | Rank | None = None, **changes``, and so does not
    list the options again; they are documented by the settings' class.

    Args:
        kind: a frozen dataclass, the settings' class.
        given: settings of that class, the value of its first field, or ``None`` for the defaults.
        changes: values of fields by name; they replace those of the given settings.
        who: the function or class that was called, for messages.

    Raises:
        LowRankError: for a name that is no field, naming the closest one; for a first field that is given twice; and
            for whatever the settings' class refuses.

    Examples:
        >>> from lowrank_layers.settings import settings_from
        >>> settings_from(lr.KVSettings, lr.KVSettings(rank=4), {"block": 32}, "LowRankCache").block
        32
        >>> settings_from(lr.KVSettings, 4, {"blocks": 32}, "LowRankCache")
        Traceback (most recent call last):
        lowrank_layers.errors.LowRankError: LowRankCache: got blocks=, which is no option; did you mean block=? ...
    """
    assert is_dataclass(kind)
    names = [field.name for field in fields(kind)]
    for name in changes:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]}=?" if close else "."
            raise LowRankError(
                f"{who}: got {name}=, which is no option{hint} The options are those of {kind.__name__}:"
                f" {', '.join(names)}."
            )
    if isinstance(given, kind):
        return replace(given, **changes)
    if given is not None and names[0] in changes:
        raise LowRankError(f"{who}: got {names[0]} twice, {given!r} and {changes[names[0]]!r}; give it once.")
    first = {} if given is None else {names[0]: given}
    return kind(**first, **changes)
