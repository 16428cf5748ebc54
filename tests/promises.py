"""The calls and keywords that docstrings, README and docs/ name, for test_docstrings.py and test_promises.py.

A promise is code between backticks. A call of this library is bound to the signature of what it names and, where its
arguments are known, run. A keyword on its own (``init="eva"``) is one that the documented callable takes.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
KEYWORD = re.compile(r"\w+=(?!=)")
"""By habit, ``init="eva"`` is a keyword and ``b = m / n`` a formula."""
SPAN = re.compile(r"``([^`]+)``|(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Promise:
    """Code in a text, and the callable that the text documents (``None`` for a page)."""

    where: str
    code: str
    owner: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.code}"


NEEDS = {"lowrank_layers.kv_cache.triton_kernels": "triton", "lowrank_layers.interop.vllm.": "vllm"}
"""Packages without which modules cannot be imported, by the beginning of their names."""


def modules() -> Iterator[ModuleType]:
    """Every module of the package, imported."""
    with contextlib.suppress(ImportError):
        import_torchvision()  # transformers imports it where it is installed
    for info in pkgutil.walk_packages(lr.__path__, "lowrank_layers."):
        needs = next((package for module, package in NEEDS.items() if info.name.startswith(module)), None)
        if needs is not None and importlib.util.find_spec(needs) is None:
            continue
        yield importlib.import_module(info.name)


def public_callables() -> Iterator[tuple[str, Any]]:
    """Every function, class and method of the package whose path has no private part."""
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    method = getattr(member, "fget", None) or getattr(member, "__func__", member)
                    if not key.startswith("_") and inspect.isfunction(method):
                        yield f"{module.__name__}.{name}.{key}", method


def promises() -> list[Promise]:
    found = []
    for where, value in public_callables():
        for double, single in SPAN.findall(inspect.getdoc(value) or "") if value.__doc__ else ():
            found.append(Promise(where, " ".join((double or single).split()), value))
    for where, text in {"README": README, **PAGES}.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
        found += [Promise(where, double or single, None) for double, single in SPAN.findall(prose)]
    return [promise for promise in found if "(" in promise.code or KEYWORD.match(promise.code)]


PROMISES = promises()
CALLABLES = dict(public_callables())


def parsed(code: str) -> ast.Expression | None:
    """The code as an expression; keywords on their own as those of a call of ``_``."""
    code = re.sub(r"=(?=[,)]|$)", "=...", code)  # `rank=` and `Budget(bytes=)` name a keyword without a value
    for text in (f"_({code})" if KEYWORD.match(code) else code,):
        with contextlib.suppress(SyntaxError):
            return ast.parse(text, mode="eval")
    return None


def resolve(node: ast.expr, owner: Any) -> Any:
    """What a dotted name of this library or torch stands for; ``None`` if it is a local variable's."""
    *path, name = ast.unparse(node).split(".")
    module = inspect.getmodule(owner)
    scopes = [vars(lr) | {key: getattr(lr, key) for key in lr.__all__}, vars(module) if module else {}]
    scopes += [vars(nn), vars(math), vars(builtins), {"lr": lr, "torch": torch, "nn": nn, "F": nn.functional}]
    value: Any = None
    for part in (*path, name):
        if value is not None:
            value = getattr(value, part)  # an attribute that is promised and missing is a failure
        else:
            value = next((scope[part] for scope in scopes if part in scope), None)
        if value is None:
            return None
    return value


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}
