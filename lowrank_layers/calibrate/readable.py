"""Fields of a dataclass that hold a tensor, or the way to read one from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Unread:
    """A tensor that is read each time it is asked for, and kept by nobody but the one who asked.

    Args:
        shape: its shape.
        read: returns it.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Value = Tensor | Unread
"""A tensor, or the way to read it."""


def read(value: Value) -> Tensor:
    """Returns the tensor.

    Args:
        value: the tensor, or the way to read it.
    """
    return value.read() if isinstance(value, Unread) else value


def own_copy(instance: object, name: str) -> Tensor:
    """Returns the tensor of a :class:`Readable` field, for the caller to change: a copy unless it was just read.

    Args:
        instance: the object that has the field.
        name: the field.
    """
    value = vars(instance)[name]
    return value.read() if isinstance(value, Unread) else value.clone()


class Readable(Generic[T]):
    """A field of a dataclass that may be given as an :class:`Unread`; who asks for it gets the tensor.

    ``vars(instance)`` has the field as it was given.

    Args:
        *default: the field's default, if it has one.
    """

    def __init__(self, *default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> T:
        if instance is None:  # how a dataclass asks for the default
            if not self._default:
                raise AttributeError(self._name)
            return self._default[0]
        value = vars(instance)[self._name]
        return cast(T, value.read() if isinstance(value, Unread) else value)

    def __set__(self, instance: object, value: T | Unread) -> None:
        vars(instance)[self._name] = value
