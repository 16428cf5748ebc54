"""The registry of methods, open to those of users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, cast

from ..errors import LowRankError
from ..layers import FactoredModule
from .group_method import GroupMethod
from .method import Method

METHODS: dict[str, Method] = {}
"""Every method by the name that plans and files use; those of the library are registered first."""

GROUP_METHODS: dict[str, GroupMethod] = {}
"""Methods over several layers, by the name that plans and files use."""

DENSE = "dense"
"""The name, in plans and files, of the choice to leave a layer as it is."""


def register_method(method: Method) -> Method:
    """Adds a method to ``METHODS``: from then on plans may choose it, and files that name it can be loaded.

    A plan names the method and holds the settings of the instance that planned the layer, so that several instances of
    one class can compete in ``make_plan(..., methods=[...])`` and each layer is built with the right one. Register the
    class before you load a plan that names it; import its layer's class before you load a model that holds it.

    Args:
        method: an instance of a frozen dataclass with the members of :class:`Method`. It replaces a registered
            instance of the same class.

    Returns:
        The method.

    Raises:
        LowRankError: if a member is missing, the name is taken by another class, or a setting could not be written
            to a plan's file.

    Examples:
        >>> method = lr.register_method(lr.TensorizedMethod(min_rows=1_000))
        >>> lr.METHODS["tensorized"] is method
        True
        >>> lr.register_method(lr.TensorizedMethod()).min_rows
        10000
    """
    kind = type(method).__name__
    settings = getattr(type(method), "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        raise LowRankError(f"register_method: got {method!r}, expected an instance of a frozen dataclass.")
    members = ("name", "layers", "form", "matches", "options", "choose", "build")
    missing = [member for member in members if not hasattr(method, member)]
    if missing:
        raise LowRankError(
            f"register_method: {kind} has no {', '.join(missing)}; see lr.Method for what each one does."
        )
    if not isinstance(method.name, str) or method.name in ("", DENSE):
        raise LowRankError(f"register_method: got the name {method.name!r}, expected a string other than {DENSE!r}.")
    wrong = [cls for cls in method.layers if not (isinstance(cls, type) and issubclass(cls, FactoredModule))]
    if wrong or not method.layers:
        raise LowRankError(
            f"register_method: {kind}.layers is {method.layers!r}, expected subclasses of FactoredModule."
        )
    other = METHODS.get(method.name)
    if other is not None and _path(other) != _path(method):
        raise LowRankError(
            f"register_method: the name {method.name!r} is taken by {type(other).__name__}; choose another."
        )
    settings_of(method)
    METHODS[method.name] = method
    return method


def check_registered(method: object) -> Method:
    """Returns the method; raises unless its class is registered."""
    known = {type(each) for each in METHODS.values()}
    if type(method) in known:
        settings_of(method)
        return cast(Method, method)
    every = [*METHODS.values(), *GROUP_METHODS.values()]
    names = ", ".join(sorted(f"{type(each).__name__}()" for each in every))
    raise LowRankError(
        f"make_plan: got method {method!r}, expected instances such as {names}; a method of your own is registered"
        " first, with lr.register_method."
    )


class UsualMethods(list[Method]):
    """The methods of single layers that compete where none are named; CP is left out where it would be slow."""


def usual_methods() -> UsualMethods:
    """Returns them."""
    return UsualMethods(method for method in METHODS.values() if not getattr(method, "on_request", False))


def is_group_method(method: object) -> bool:
    """Returns whether a method takes several layers at once."""
    return type(method) in {type(each) for each in GROUP_METHODS.values()}


def refuse_group_methods(methods: Iterable[object] | None, owner: str, but: type | None = None) -> None:
    """Raises where one of the methods takes several layers at once, unless it is of a class that may."""
    for method in methods or ():
        if is_group_method(method) and type(method) is not but:
            raise LowRankError(
                f"{owner}: got {method!r}, which takes several layers at once, expected methods of single layers; use"
                " make_plan with a budget and factorize_ for it."
            )


def settings_of(method: Any) -> dict[str, Any]:
    """The fields of a method, which a plan keeps beside its name.

    Raises:
        LowRankError: if a plan's file could not hold one of them.
    """
    settings = {field.name: getattr(method, field.name) for field in fields(method) if field.init}
    for name, value in settings.items():
        if not _is_plain(value):
            raise LowRankError(
                f"{type(method).__name__}: got {name}={value!r}, expected a number, a string, None or a tuple of them,"
                " which a plan's file can hold."
            )
    return settings


def with_settings(name: str, settings: dict[str, Any]) -> Method:
    """The registered method of that name, with these settings.

    Raises:
        LowRankError: if no such method is registered, or its class does not take the settings.
    """
    method: Any = METHODS.get(name)
    if method is None:
        raise LowRankError(
            f"the method {name!r} is not registered; call lr.register_method before loading a plan that names it."
            f" Registered: {', '.join(METHODS)}."
        )
    try:
        built_by: Method = replace(method, **settings)
    except (TypeError, ValueError) as error:
        raise LowRankError(f"the method {name!r} does not take the settings {settings!r}: {error}.") from None
    return built_by


def as_tuples(value: Any) -> Any:
    """Replaces lists by tuples, as a frozen method holds them."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _is_plain(value: object) -> bool:
    """True if a value is the same after a round trip through JSON in which lists are read as tuples."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _path(method: Method) -> tuple[str, str]:
    """Module and name of the class. A notebook's cell that runs again defines the same class anew."""
    return type(method).__module__, type(method).__qualname__
