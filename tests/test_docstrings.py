"""What the texts of the package say of signatures is true; `make lint` runs this file.

- ``Args`` names the parameters of the function, class or dataclass, in their order.
- Every public function and class that takes parameters has ``Args``, and every method of such a class that takes two or
  more, unless it overrides one.
- A call or keyword between backticks, in README and docs/ as well, fits the signature of what it names.
- A keyword in an error message is a parameter of this package, and an in-place function that it names exists.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import lowrank_layers as lr
from lowrank_layers import interop, plot

from .promises import CALLABLES, PROMISES, ROOT, Promise, modules, parameters, parsed, resolve

FORMULAS = {"U", "tanh", "P", "E"}
"""Names that stand before a parenthesis in a formula and are no functions of torch or this library."""
FOREIGN = {
    "is_causal",
    "lora_unet_",
    "lora_te_",
    "weight_decay",
    "n_layers",
    "device_map",
    "push_to_hub",
    "remote_code",
}
"""Keywords of transformers, torch and tensorly-torch, and prefixes in kohya's files."""
KNOWN = {name for value in CALLABLES.values() for name in parameters(value)}
"""Every parameter of the package."""
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:", re.M)
"""A line of ``Args``: one name, or several that share a description."""


def documented_parameters(value: Any) -> list[str] | None:
    """The names in the section ``Args`` of a value's own docstring; ``None`` if it has no such section."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.cleandoc(value.__doc__ or ""), re.M)
    return None if section is None else [name for entry in ENTRY.findall(section[1]) for name in entry.split(", ")]


def signature_parameters(value: Any) -> list[str]:
    """The names of a signature's parameters as a docstring writes them; private ones do not count."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    is_method = inspect.isfunction(value) and "." in value.__qualname__
    names = [stars.get(parameter.kind, "") + name for name, parameter in parameters(value).items()]
    if is_method and names[:1] in (["self"], ["cls"]):
        del names[0]
    return [name for name in names if name[0] != "_"]


def with_args() -> dict[str, Any]:
    """Every callable of the package whose docstring has ``Args``, private ones too, by its path."""
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            members = vars(value).items() if inspect.isclass(value) else ()
            methods = [(f"{name}.{key}", getattr(member, "__func__", member)) for key, member in members]
            for path, own in [(name, value), *methods]:
                here = callable(own) and getattr(own, "__module__", None) == module.__name__
                if here and documented_parameters(own):
                    found[f"{module.__name__}.{path}"] = own
    return found


@pytest.mark.parametrize("path", WITH_ARGS := with_args())
def test_args_are_the_parameters_of_the_signature(path):
    assert documented_parameters(WITH_ARGS[path]) == signature_parameters(WITH_ARGS[path])


def public(home: ModuleType, names: list[str]) -> Iterator[Any]:
    """The functions and classes among these names that have parameters of their own."""
    for value in (getattr(home, name) for name in names if name[0] != "_"):
        own = inspect.isfunction(value) or (inspect.isclass(value) and not getattr(value, "_is_protocol", False))
        # an abstract class takes what nn.Module or object does
        if own and signature_parameters(value) not in ([], ["*args", "**kwargs"]):
            yield value


PUBLIC = [
    *public(lr, lr.__all__),
    *public(interop, list(vars(interop))),
    *public(plot, list(vars(plot))),
]


@pytest.mark.parametrize("value", PUBLIC, ids=lambda value: value.__name__)
def test_public_functions_and_classes_have_args(value):
    assert documented_parameters(value)


def own_methods() -> dict[str, Any]:
    """The methods of public classes that override nothing and take two or more arguments."""
    found = {}
    for cls in filter(inspect.isclass, PUBLIC):
        protocols = [lr.Method] if cls in map(type, lr.METHODS.values()) else []
        bases = [*cls.__mro__[1:], *protocols]
        for name, member in vars(cls).items():
            method = getattr(member, "__func__", member)
            own = inspect.isfunction(method) and name[0] != "_" and not any(name in vars(base) for base in bases)
            if own and len(signature_parameters(method)) > 1:
                found[f"{cls.__name__}.{name}"] = method
    return found


@pytest.mark.parametrize("path", OWN_METHODS := own_methods())
def test_methods_of_public_classes_have_args(path):
    assert documented_parameters(OWN_METHODS[path])


def takes(function: Any, keyword: str) -> bool:
    """Whether a function has this parameter, or takes any keyword and its settings, or the package, have it."""
    found = parameters(function)
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values())
    kinds = re.findall(r"\w+Settings", str(found["settings"].annotation)) if "settings" in found else []
    options = {name for kind in kinds for name in parameters(getattr(lr, kind))} if kinds else KNOWN
    return keyword in found or (open_ended and keyword in options)


def check_call(call: ast.Call, promise: Promise) -> None:
    """The call names something real, and its arguments fit the signature."""
    keywords = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    if ast.unparse(call.func) == "_":  # keywords on their own
        if not call.args:
            everywhere = (
                [value for _, value in CALLABLES.items()] if promise.owner is None else relatives(promise.owner)
            )
            for keyword in set(keywords) - FOREIGN:
                assert any(takes(function, keyword) for function in everywhere), f"nothing takes {keyword}= here"
        return
    function = resolve(call.func, promise.owner)
    if function is None:
        name = ast.unparse(call.func)
        local = "." in name or name in FORMULAS or name in parameters(promise.owner)
        assert local or not re.fullmatch(r"[a-z]\w*_|(lora|low_rank|LowRank)\w*", name), f"{name} does not exist"
        return
    if inspect.getmodule(function) is not None and not any(isinstance(arg, ast.Starred) for arg in call.args):
        with contextlib.suppress(ValueError):  # torch's own functions without a signature
            inspect.signature(function).bind_partial(*call.args, **dict.fromkeys(keywords))


def relatives(owner: Any) -> list[Any]:
    """The documented callable, its class, what its text names, and its neighbours in the same file."""
    path = owner.__qualname__.rpartition(".")[0]
    module = inspect.getmodule(owner)
    named = [getattr(lr, key) for key in re.findall(r"\w+", inspect.getdoc(owner) or "") if key in lr.__all__]
    parent = [resolve(ast.parse(path, mode="eval").body, owner)] if path else []
    neighbours = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    return [value for value in (owner, *parent, *named, *neighbours) if callable(value)]


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_named_calls_and_keywords_exist(promise):
    tree = parsed(promise.code)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Call):
            check_call(node, promise)


def error_keywords() -> Iterator[tuple[str, str]]:
    """Keywords that an error message names, as ``exact=True``, with the file."""
    for path in sorted((ROOT / "lowrank_layers").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                words = re.findall(r"(?<![\w.{])([a-z]\w*)=(?!=)", " ".join(map(str, texts)))
                yield from ((path.relative_to(ROOT).as_posix(), word) for word in words)


@pytest.mark.parametrize(("path", "keyword"), sorted(set(error_keywords())))
def test_keywords_in_error_messages_exist(path, keyword):
    assert keyword in FOREIGN | KNOWN, keyword


def remedies() -> list[tuple[str, str]]:
    """In-place functions that an error message or a docstring names, as ``densify_``; by file."""
    found = set()
    for path in (ROOT / "lowrank_layers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                words = re.findall(r"(?<![\w.{])([a-z]\w*[a-z]_)(?![\w{}])", node.value)
                found |= {(path.relative_to(ROOT).as_posix(), word) for word in words}
    return sorted((path, word) for path, word in found if word not in FOREIGN)


@pytest.mark.parametrize(("path", "name"), remedies())
def test_in_place_functions_that_a_text_names_exist(path, name):
    assert name in lr.__all__ or any(key.rpartition(".")[2] == name for key in CALLABLES), name
