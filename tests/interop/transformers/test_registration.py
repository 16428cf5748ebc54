"""transformers knows the format after ``import lowrank_layers``, whichever of the two is imported first."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import lowrank_layers as lr
from lowrank_layers.interop.transformers.import_hook import after_import
from lowrank_layers.interop.transformers.registration import register

ROOT = Path(__file__).resolve().parents[3]
TORCHVISION = """
import contextlib
from benchmarks.vision import import_torchvision
with contextlib.suppress(ImportError):
    import_torchvision()
"""
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'lowrank' in known\n"
ORDERS = {
    "ours first": "import lowrank_layers\nfrom transformers import PreTrainedModel\n",
    "theirs first": "from transformers import PreTrainedModel\nimport lowrank_layers\n",
    "theirs by name only": "import transformers, lowrank_layers\nfrom transformers import PreTrainedModel\n",
}


@pytest.mark.parametrize("order", ORDERS)
def test_in_any_order(order):
    subprocess.run([sys.executable, "-c", TORCHVISION + ORDERS[order] + KNOWN], check=True, cwd=ROOT)


def test_it_is_registered_once():
    save = transformers.PreTrainedModel.save_pretrained
    register()
    assert transformers.PreTrainedModel.save_pretrained is save
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["lowrank"] is lr.LowRankConfig
    assert AUTO_QUANTIZER_MAPPING["lowrank"].__name__ == "LowRankQuantizer"
    assert save.__doc__ == save.__wrapped__.__doc__


@pytest.fixture
def new_module(tmp_path, monkeypatch):
    """The name of a module that nobody has imported."""
    (tmp_path / "new_module.py").write_text("import os\nvalue = 3 if 'FAILS' not in os.environ else 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "new_module"
    sys.modules.pop("new_module", None)


def test_a_hook_runs_once_after_the_module_is_there(new_module, monkeypatch):
    finders = list(sys.meta_path)
    seen = []
    after_import(new_module, lambda: seen.append(sys.modules[new_module].value))
    assert seen == []
    importlib.import_module("colorsys")
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(new_module)
    monkeypatch.delenv("FAILS")
    assert seen == []
    module = importlib.import_module(new_module)
    assert seen == [3]
    assert importlib.reload(module) is module
    assert seen == [3]
    assert sys.meta_path == finders
    after_import(new_module, lambda: seen.append("at once"))
    assert seen == [3, "at once"]


def test_a_module_that_is_not_there_is_the_error_it_always_is(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    after_import("no_such_module", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")
