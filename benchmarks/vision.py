"""Imports torchvision even where its compiled operators do not fit torch; not part of the package."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Imports ``torchvision`` with its models and transforms.

    PyPI's torchvision is compiled for CUDA. Beside a CPU-only torch its operators do not load, and the import ends in
    ``operator torchvision::nms does not exist``, because it describes two of them to torch unconditionally. Models
    and transforms call neither: declaring the two without an implementation is enough. It is done only after an
    import that failed, since a library that does load must be the one to declare them.

    Raises:
        ImportError: if torchvision is not installed.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in OPERATORS:
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", SCHEMA)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half-imported
        import torchvision
    return torchvision
