import importlib
from pathlib import Path

import pytest

from benchmarks.vision import import_torchvision

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def hook(monkeypatch):
    """Imports a file of docs/hooks, none of which here needs MkDocs."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(DOCS / "hooks")
    import_torchvision()  # transformers imports it where it is installed
    return importlib.import_module
