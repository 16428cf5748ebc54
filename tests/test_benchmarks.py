"""The benchmarks run, at a small size; their claims are measured by running them in full."""

import argparse
import datetime
import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kv_memory, seed_lenet
from benchmarks.data import available, cifar10, lenet, mnist, resnet20
from benchmarks.robot_data import HISTORY, HORIZON, recording, synthetic_recording
from benchmarks.robot_policy import ActionChunkPolicy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {
    "command_line": "command_line",
    "cp": "cp",
    "ddp_convergence": "ddp_convergence_small",
    "decompose": "decompose",
    "dense_adapters": "dense_adapters",
    "export": "export",
    "import_time": "import_time",
    "kv_decode": "kv_decode",
    "kv_memory": "kv_memory",
    "kv_quality": "kv_quality",
    "kv_real": "kv_real",
    "language": "language",
    "large": "large",
    "latency": "latency",
    "layers": "layers",
    "lora": "lora",
    "make_plan": "make_plan",
    "nmf": "nmf",
    "projection": "projection",
    "recovery": "recovery",
    "robot_g1": "robot_g1",
    "robust_statistics": "robust_statistics",
    "sentence_embeddings": "sentence_embeddings",
    "sequence": "sequence",
    "spectrum_monitor": "spectrum_monitor",
    "transformers_folder": "transformers_folder",
    "vla": "vla",
}
"""The benchmarks that run small, and the theme that their result file is named after."""
IN_FULL = {
    "link": "needs root: it limits the bandwidth of a network device",
    "resnet_cifar": "takes minutes",
    "seed_lenet": "is run in full below",
    "without_loss": "takes minutes",
}
DATA = {"recovery": "lenet_mnist", "sequence": "cifar_resnet"}
"""The shared data that a benchmark reads when it runs small."""
NEEDS = {
    "dense_adapters": "transformers",
    "export": "transformers",
    "language": "transformers",
    "sentence_embeddings": "transformers",
    "large": "transformers",
    "transformers_folder": "accelerate",
    "vla": "minigrid",
}
"""The packages of extras that a benchmark cannot run without."""


def exit_code(main):
    """What a script exits with; ``None`` if it ends by itself."""
    try:
        main()
    except SystemExit as end:
        return end.code
    return None


def tables(text):
    """The tables of a Markdown text: rows of cells, the head first."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    return [[line.strip("|").split("|") for line in block.splitlines() if "---" not in line] for block in blocks]


@pytest.mark.parametrize("name", RESULTS)
def test_smoke(name, tmp_path, monkeypatch):
    if name in DATA and not available(DATA[name]):
        pytest.skip(f"needs {DATA[name]} in LOWRANK_DATA")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--threads", "1", "--out", str(tmp_path)])
    assert not exit_code(importlib.import_module(f"benchmarks.{name}").main)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{RESULTS[name]}_cpu_{datetime.date.today():%Y%m}.md"
    text = path.read_text(encoding="utf-8")
    title, hardware = re.match(r"# (.+)\n\n(.+)\n", text).groups()
    assert title
    assert re.search(r"cores, 1 threads, torch [\d.]+.*, lowrank-layers [\d.]+", hardware)
    found = tables(text)
    assert found
    for head, *rows in found:
        assert rows
        assert {len(row) for row in rows} == {len(head)}
        numbers = re.findall(r"(?<![\w.])-?(?:[\d,]*\d(?:\.\d+)?|nan|inf)(?![\w.])", str(rows))
        assert numbers
        assert all(math.isfinite(float(number.replace(",", ""))) for number in numbers)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("label", list(kv_memory.CACHES)[-2:])
def test_a_cache_takes_the_memory_that_it_counts(label):
    """In a process of its own, for the smallest caches, of which what is not counted would be the greatest part."""
    sizes = argparse.Namespace(threads=1, layers=1, batch=2, length=8192)
    found = kv_memory.measured(label, sizes)
    assert found["resident"] == pytest.approx(found["nbytes"], rel=0.05)


@pytest.mark.parametrize("name", IN_FULL)
def test_the_others_start(name, monkeypatch, capsys):
    """What they import exists; running them would take too long."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    assert exit_code(importlib.import_module(f"benchmarks.{name}").main) == 0
    assert "--threads" in capsys.readouterr().out


def test_every_benchmark_is_run():
    scripts = (ROOT / "benchmarks").glob("*.py")
    writing = {path.stem for path in scripts if re.search(r"^(?!def ).*write_result\(", path.read_text(), re.M)}
    assert writing == {*RESULTS, *IN_FULL}


@pytest.mark.skipif(not available("lenet_mnist"), reason="needs lenet_mnist in LOWRANK_DATA")
def test_seed_lenet_meets_every_line(tmp_path, monkeypatch, capsys):
    """The published tables to the digit and the four bars: the script's exit code says so."""
    monkeypatch.setattr(sys, "argv", ["seed_lenet", "--threads", "1", "--out", str(tmp_path)])
    assert exit_code(seed_lenet.main) == 0
    assert "All reproduced, all bars met." in capsys.readouterr().out


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


@pytest.mark.skipif(not available("robot_g1"), reason="needs robot_g1 in LOWRANK_DATA")
def test_the_recorded_robot_is_loaded_right():
    """Images stand at the frames of their own episodes, from their second on."""
    data = recording()
    assert data.states.shape == data.actions.shape == (35_965, 26)
    assert len(set(data.episode.tolist())) == 100
    assert len(set(data.episode[data.image >= 0].tolist())) == 24
    assert sorted(set(data.image.tolist())) == [-1, *range(294)]
    starts = torch.tensor([data.image.tolist().index(row) for row in range(294)])
    assert ((starts - data.first[starts]) % 30 == 0).all()
    assert (data.episode[starts].diff() >= 0).all()


def test_batches_of_the_robot_stay_inside_an_episode():
    data = synthetic_recording()
    frames = torch.tensor([60, 119])  # the first and the last frame of the second episode
    states, actions = data.batch(frames, camera=False)
    assert torch.equal(states[0], data.states[60].expand(len(HISTORY), -1))
    assert torch.equal(states[1], data.states[119 - torch.tensor(HISTORY)])
    assert torch.equal(actions[0], data.actions[60 : 60 + HORIZON])
    assert torch.equal(actions[1], data.actions[119].expand(HORIZON, -1))


def test_images_of_the_robot_are_those_of_the_last_second():
    data = synthetic_recording()
    assert data.image[60:120].tolist() == [2] * 30 + [3] * 30
    assert (data.image[360:] == -1).all()
    with_images, without = data.batches(torch.tensor([89, 400, 90]), size=2)
    assert torch.equal(with_images[1], data.images[[2, 3]])
    assert torch.equal(without[0], data.batch(torch.tensor([400]), camera=False)[0])


def test_the_robots_policy_predicts_a_change_of_the_present_state():
    policy = ActionChunkPolicy(joints=3, width=64, depth=1, image=(32, 32))
    torch.nn.init.zeros_(policy.head.weight)
    states = torch.randn(2, len(HISTORY), 3)
    for images in ((), (torch.randn(2, 3, 32, 32),)):
        assert torch.equal(policy(states, *images), states[:, -1:].expand(-1, HORIZON, -1))
