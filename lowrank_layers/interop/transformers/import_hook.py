"""A function that is called as soon as a module of another library has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, function: Callable[[], None]) -> None:
    """Calls a function once the module is there: at once where it has been imported, else right after it is.

    Args:
        name: full name of the module.
        function: what is called.

    Examples:
        >>> from lowrank_layers.interop.transformers.import_hook import after_import
        >>> after_import("json", lambda: print("json is there"))
        json is there
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, with a loader that calls the function when it is done."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name = name
        self.function = function
        self.asks_the_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.asks_the_others:
            return None
        self.asks_the_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asks_the_others = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)  # where it fails, the next attempt comes here again
            sys.meta_path.remove(self)
            self.function()

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec
