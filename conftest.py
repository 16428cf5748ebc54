"""Names that every docstring example may use."""

import importlib.util
import sys

import pytest
import torch

import lowrank_layers
from benchmarks.vision import import_torchvision

NEEDS = {"triton": "lowrank_layers/kv_cache/triton_kernels.py", "vllm": "lowrank_layers/interop/vllm"}
collect_ignore = [path for package, path in NEEDS.items() if not importlib.util.find_spec(package)]


def pytest_collect_file(file_path):
    """Transformers imports torchvision where it is installed, also for doctests."""
    if "transformers" in f"{file_path.parent.name} {file_path.name}" and importlib.util.find_spec("torchvision"):
        import_torchvision()


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, nn=torch.nn, lr=lowrank_layers)


@pytest.fixture(autouse=True)
def _no_open_figures():
    """Closes what a test, a docstring or an example has drawn: matplotlib warns of more than 20 open figures."""
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")
