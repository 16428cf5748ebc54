"""``save_pretrained(folder, remote_code=True)``: read by transformers alone, to the same bits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.layers import is_resized, mark_resized

from .models import KINDS, Kind, narrow, narrow_pairs, output, tokens

READ = ("llama", "tied llama", "qwen3 moe", "gpt2", "t5", "bert")
LOADS = """
import sys
sys.modules["lowrank_layers"] = None
from pathlib import Path
import contextlib, torch
from benchmarks.vision import import_torchvision
with contextlib.suppress(ImportError):
    import_torchvision()
import transformers
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto, inputs = (folder / "auto").read_text(), torch.load(folder / "inputs.pt")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(**inputs)[0], folder / "output.pt")
    model.save_pretrained(folder / "again")
    again = getattr(transformers, auto).from_pretrained(folder / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
"""


def pairs(kind: Kind) -> nn.Module:
    """The model with pairs of layers only."""
    model = kind.dense()
    return lr.factorize_(model, lr.make_plan(model, rank=9))


def pivots(kind: Kind) -> nn.Module:
    """The model with linear layers in pivot form."""
    model = kind.dense()
    return lr.factorize_(model, lr.make_plan(model, rank=9, methods=[lr.PivotMethod()]))


MODELS = {name: (name, pairs) for name in READ} | {f"{name}, pivots": (name, pivots) for name in ("llama", "gpt2")}
MODELS |= {f"{name}, fewer units": (name, narrow) for name in ("llama", "bert")}
MODELS |= {"llama, fewer units and pairs": ("llama", narrow_pairs)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder per kind, each loaded and run in a process without lowrank_layers."""
    root = tmp_path_factory.mktemp("remote")
    for name, (of, make) in MODELS.items():
        kind = KINDS[of]
        make(kind).save_pretrained(root / name, remote_code=True, max_shard_size="60KB")
        (root / name / "auto").write_text(kind.auto)
        torch.save(kind.inputs(), root / name / "inputs.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("cache")), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", LOADS, str(root)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_the_library_computes_the_same_bits(saved, name):
    of, make = MODELS[name]
    model = make(KINDS[of])
    assert sum(isinstance(module, lr.FactoredModule) or is_resized(module) for module in model.modules()) >= 4
    if "fewer units" in name:
        assert len({weight.shape for weight in model.state_dict().values() if {41, 47} & {*weight.shape}}) >= 4
    assert torch.equal(torch.load(saved / name / "output.pt"), output(model, KINDS[of].inputs()))


def test_who_does_not_allow_the_code_gets_an_error(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        KINDS["llama"].load(saved / "llama", trust_remote_code=False)


def test_a_dense_model_needs_no_code(tmp_path):
    model = KINDS["llama"].dense()
    model.save_pretrained(tmp_path, remote_code=True)
    assert torch.equal(output(KINDS["llama"].load(tmp_path), tokens()), output(model, tokens()))
    assert not list(tmp_path.glob("*.py"))


def test_other_layers_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(lr.LowRankError, match=r"'vit.embeddings.patch_embeddings.projection' \(\w+Conv2d\); skip them"):
        KINDS["vit"].factored().save_pretrained(tmp_path / "vit", remote_code=True)

    class Own(type(KINDS["llama"].dense())):
        pass

    resized = KINDS["vit"].dense()
    mark_resized(resized.vit.embeddings.patch_embeddings.projection)
    with pytest.raises(lr.LowRankError, match=r"'vit.embeddings.patch_embeddings.projection' \(Conv2d of another size"):
        resized.save_pretrained(tmp_path / "resized", remote_code=True)

    own = copy.deepcopy(pairs(KINDS["llama"]))
    own.__class__ = Own
    with pytest.raises(lr.LowRankError, match="got a Own, expected a class of transformers"):
        own.save_pretrained(tmp_path / "own", remote_code=True)
    with pytest.raises(lr.LowRankError, match="uploaded before the code is"):
        pairs(KINDS["llama"]).save_pretrained(tmp_path / "hub", remote_code=True, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
    assert output(own, tokens()).isfinite().all()
