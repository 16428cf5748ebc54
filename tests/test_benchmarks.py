"""The benchmarks run, at a small size; their claims are measured by running them in full."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data import available, cifar10, lenet, mnist, resnet20

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "ddp_convergence",
    "decompose",
    "kv_decode",
    "kv_memory",
    "kv_quality",
    "layers",
    "lora",
    "nmf",
    "projection",
]


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.suffix for path in tmp_path.iterdir()] == [".md"]


@pytest.mark.skipif(not available("lenet_mnist"), reason="needs lenet_mnist in LOWRANK_DATA")
def test_seed_lenet_meets_every_line(tmp_path):
    """The published tables to the digit and the four bars: the script's exit code says so."""
    command = [sys.executable, "-m", "benchmarks.seed_lenet", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "All reproduced, all bars met." in done.stdout


@pytest.mark.skipif(not available("cifar_resnet"), reason="needs cifar_resnet in LOWRANK_DATA")
def test_resnet20_is_loaded_right():
    images, labels = cifar10("test")
    assert images.shape == (10_000, 3, 32, 32)
    assert float((resnet20()(images[:500]).argmax(1) == labels[:500]).float().mean()) > 0.89


@pytest.mark.skipif(not available("lenet_mnist"), reason="needs lenet_mnist in LOWRANK_DATA")
def test_lenet_is_loaded_right():
    images, labels = mnist("test")
    assert len(images) == 10_000
    assert sum(p.numel() for p in lenet().parameters()) == 44_426
    assert float((lenet()(images[:1000]).argmax(1) == labels[:1000]).float().mean()) > 0.96
