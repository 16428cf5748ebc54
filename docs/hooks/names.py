"""The public names of the package, and links to what the reference says of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import lowrank_layers as lr
from lowrank_layers import interop, plot

CONSTANTS = {"METHODS": "lowrank_layers.compress.registry", "Rank": "lowrank_layers.rank.rule"}
"""The modules of public values that are no functions or classes."""


@dataclass(frozen=True)
class Name:
    """A public name: how it is called, and where it is defined."""

    call: str
    path: str

    @property
    def package(self) -> str:
        """The package by which it is called, or the one that holds it."""
        home = self.call.partition(".")[0]
        return self.path.split(".")[1] if home == "lr" else home

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        module, _, name = self.path.rpartition(".")
        value = getattr(importlib.import_module(module), name)
        text = inspect.getdoc(value) or "" if callable(value) else docstring_below(module, name)
        return re.split(r"(?<=[.:])\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(":")


@cache
def public_names() -> dict[str, Name]:
    """Every public name, by how it is called: ``lr.svd``, ``plot.losses``, ``interop.to_tltorch``."""
    found = {f"lr.{name}": getattr(lr, name) for name in lr.__all__}
    for home, package in (("plot", plot), ("interop", interop)):
        found |= {f"{home}.{name}": value for name, value in vars(package).items() if inspect.isfunction(value)}
    named = {call: call.partition(".")[2] for call in found}
    homes = {call: CONSTANTS.get(named[call]) or value.__module__ for call, value in found.items()}
    return {call: Name(call, f"{homes[call]}.{named[call]}") for call in found}


def docstring_below(module: str, name: str) -> str:
    """The string that stands below an assignment to ``name``, as the documentation of a constant does."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for node, after in pairwise(body):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in [getattr(target, "id", None) for target in targets] and isinstance(after, ast.Expr):
            return str(ast.literal_eval(after.value))
    return ""


def linked(code: str, *, always: bool = False) -> str:
    """A span of code as Markdown, with a link where it is or calls a public name.

    Args:
        code: ``lr.svd(m, 3)``, ``add_lora_``, ``plot.losses``.
        always: takes ``svd`` for the function as well, which in a text may be a word.
    """
    start = re.match(r"(lr\.|lowrank_layers\.)?((?:plot\.|interop\.)?\w+)(?![.\w])", code)
    if not start:
        return f"`{code}`"
    name = public_names().get(start[2]) or public_names().get(f"lr.{start[2]}")
    word = re.fullmatch("[a-z]+", code) is not None
    return f"[`{code}`][{name.path}]" if name and (always or not word) else f"`{code}`"


def without_roles(text: str) -> str:
    """A docstring in Markdown: Sphinx's roles become formulas, which ``mathml.py`` draws, and links to public names."""
    text = re.sub(r":math:`([^`]+)`", lambda m: f"`#!math {' '.join(m[1].split())}`", text)
    text = re.sub(r"(:\w+:`)~[\w.]*\.(\w+`)", r"\1\2", text)
    text = re.sub(r":\w+:`([^`]+)`", lambda m: linked(m[1], always=True), text)
    return re.sub(r"``([^`]+)``", lambda m: linked(m[1]), text)
