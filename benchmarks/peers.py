"""Optimizers with projected gradients of other libraries, which are no dependencies."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

from .vision import import_torchvision


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def peer(name: str) -> Any:
    """The module ``galore_torch`` or ``apollo_torch``, with an empty bitsandbytes (only 8-bit variants need it)."""
    if has("torchvision"):
        import_torchvision()
    if not has("bitsandbytes"):
        for path in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "bitsandbytes.functional"):
            sys.modules.setdefault(path, ModuleType(path))
        sys.modules["bitsandbytes"].functional = sys.modules["bitsandbytes.functional"]  # type: ignore[attr-defined]
        sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = torch.optim.Optimizer  # type: ignore[attr-defined]
    try:
        return importlib.import_module(name)
    finally:
        for path in [path for path, module in sys.modules.items() if path.partition(".")[0] == "bitsandbytes"]:
            if getattr(sys.modules[path], "__file__", None) is None:
                del sys.modules[path]
