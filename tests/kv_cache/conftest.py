"""Transformers imports torchvision where it is installed, and beside a CPU-only torch that needs help."""

import importlib.util

from benchmarks.vision import import_torchvision

if importlib.util.find_spec("torchvision"):
    import_torchvision()
