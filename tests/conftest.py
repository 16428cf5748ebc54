from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

LONG = (
    "test_architectures",
    "test_benchmarks",
    "test_examples",
    "test_elastic",
    "test_hook",
    "test_composability",
    "test_conv_properties",
    "test_seq2seq",
)
"""Files that take longest. They start first: with several workers, the last file to start decides when all are done."""


def pytest_collection_modifyitems(items):
    order = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(Path(item.path).stem, len(LONG)))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def headless():
    """Draws without a screen."""
    pytest.importorskip("matplotlib").use("Agg")
