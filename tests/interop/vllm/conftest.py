"""What the tests with the stand-in for vLLM need."""

from importlib import import_module
from pathlib import Path

import pytest

import lowrank_layers as lr
from tests.interop.vllm import stand_in


@pytest.fixture
def vllm(monkeypatch):
    """What vLLM has registered by the entry point of the package."""
    stand_in.install(monkeypatch)
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((Path(lr.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = scripts["entry-points"]["vllm.general_plugins"]["lowrank_layers"].partition(":")
    getattr(import_module(module), name)()
    return stand_in.REGISTERED["lowrank"]
