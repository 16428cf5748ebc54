"""Every example runs, and does what it says."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.data import ROOT as DATA, available

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in the folder ``tmp_path`` and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(ROOT / "examples")

    def example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return example


def test_quickstart(tmp_path):
    """As a user starts it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--budget", "0.3", "--epochs", "12"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    out = done.stdout
    assert "whole model" in out
    assert "outputs identical to the bit" in out
    # whether so small a model can gain time depends on the machine
    assert re.search(
        r"latency: dense .* predicted .* measured|Budget\(params=0.5, latency=1.0\): .* It stays dense", out
    )
    before, after = map(float, re.search(r"test accuracy, %\s+([\d.]+)\s+([\d.]+)", out).groups())
    assert before > 95
    assert after > before - 2
    dense, small = (int(n.replace(",", "")) for n in re.search(r"parameters\s+([\d,]+)\s+([\d,]+)", out).groups())
    assert small <= 0.3 * dense
    with safe_open(tmp_path / "quickstart_out" / "small.safetensors", framework="pt") as file:
        assert "lowrank_layers" in file.metadata()
    assert (tmp_path / "quickstart_out" / "quickstart.png").stat().st_size > 10_000


@pytest.mark.skipif(not available("lenet_mnist"), reason="needs lenet_mnist in LOWRANK_DATA")
def test_quickstart_takes_mnists_files():
    example = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    x, y, x_test, y_test = example["mnist"](DATA / "lenet_mnist")
    assert (x.shape, y.shape) == ((60_000, 1, 28, 28), (60_000,))
    assert (x_test.shape, y_test.shape) == ((10_000, 1, 28, 28), (10_000,))
    model = example["build"](28)
    example["train"](model, x[:2_000], y[:2_000], epochs=1, seconds=60)
    assert example["accuracy"](model.eval(), x_test[:1_000], y_test[:1_000]) > 60


@pytest.mark.skipif(not available("pycode_llama", "text"), reason="needs pycode_llama and text in LOWRANK_DATA")
def test_lora_finetune(tmp_path, run):
    out = run("lora_finetune.py", "--model", DATA / "pycode_llama", "--steps", "4", "--batch", "2")
    assert "PiSSA disabled is the base to the bit: True" in out
    losses = [float(number) for number in re.findall(r"(?:saved and loaded|merged): held-out loss ([\d.]+)", out)]
    rows = re.findall(r"^(base|LoRA|PiSSA) +[\d,]+ +([\d.]+) +[\d.]+$", out, flags=re.M)
    table = {label: float(loss) for label, loss in rows}
    assert table["PiSSA"] < table["base"]
    assert table["LoRA"] < table["base"]
    assert losses == [table["PiSSA"]] * 2
    names = {path.name for path in (tmp_path / "lora_out" / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "lora_out" / "losses.png").stat().st_size > 10_000


@pytest.mark.skipif(not available("pycode_llama"), reason="needs pycode_llama in LOWRANK_DATA")
def test_generate(tmp_path, run):
    options = ("--model", DATA / "pycode_llama", "--text", DATA / "pycode_llama" / "valid.txt")
    out = run("generate.py", *options, "--prompt", "512", "--tokens", "24", "--windows", "1")
    assert re.search(r"first token that differs: (none|\d+ of 24)", out)
    assert float(re.search(r"([\d.]+) times fewer bytes", out)[1]) > 2
    curves = {
        label: re.findall(r"([\d,]+) KiB: ([\d.]+)", line)
        for label, line in re.findall(r"^(exact|low rank)(.*)", out, re.M)
    }
    (exact,) = curves["exact"]
    assert float(curves["low rank"][-1][1]) == pytest.approx(float(exact[1]), rel=0.01)
    assert all(int(size.replace(",", "")) < int(exact[0].replace(",", "")) for size, _ in curves["low rank"])
    assert (tmp_path / "generate_out" / "perplexity.png").stat().st_size > 10_000


@pytest.mark.skipif(not available("nmf/Datawhale.jpg"), reason="needs nmf/Datawhale.jpg in LOWRANK_DATA")
def test_image_svd(tmp_path, run):
    out = run("image_svd.py")
    energies = dict(re.findall(r"^ +(\d+) +(0\.\d{4}) ", out, re.M))
    assert energies == {"5": "0.9863", "10": "0.9941", "20": "0.9981", "50": "0.9997"}
    row = r"^ +\(\d+, \d+, 3\) +([\d,]+) +([\d.]+) +rank \d+ +([\d,]+) +([\d.]+)$"
    colours = [[float(number.replace(",", "")) for number in found] for found in re.findall(row, out, re.M)]
    assert len(colours) == 4
    for values, error, more_values, other_error in colours:
        assert values <= more_values
        assert error < other_error
    row = r"^ +(\d+) +([\d.]+) +\d+ +([\d.]+) +\d+ +([\d.]+)$"
    noise = [[float(number) for number in found] for found in re.findall(row, out, re.M)]
    assert [level for level, *_ in noise] == [10, 25, 50]
    for level, before, after, best in noise:
        # noise of this size has 20 log10(255 / level) decibels, and more once values are cut to the range of pixels
        assert before > 20 * math.log10(255 / level) - 0.1
        assert before + 1 < after <= best < after + 1
    for name in ("ranks.png", "colour.png", "denoised.png"):
        assert (tmp_path / "image_svd_out" / name).stat().st_size > 10_000


@pytest.mark.skipif(not available("nmf/Datawhale.jpg"), reason="needs nmf/Datawhale.jpg in LOWRANK_DATA")
def test_figures(tmp_path, run):
    out = run("figures.py", "--restarts", "3", "--dark")
    written = re.findall(r"^written: (.+\.png)$", out, re.M)
    assert len(written) == len(set(written)) == 13
    for name in written:
        assert (tmp_path / name).stat().st_size > 5_000


def test_vla_policy(tmp_path, run):
    pytest.importorskip("minigrid")
    few = ("--demonstrations", "40", "--width", "32", "--batch", "32", "--steps", "30", "--recovery", "10")
    out = run("vla_policy.py", *few, "--episodes", "4", "--held-out", "32", "--budget", "0.5")
    dense, small = (int(n.replace(",", "")) for n in re.search(r"^parameters +([\d,]+) +([\d,]+)", out, re.M).groups())
    assert small <= 0.5 * dense
    assert re.search(r"^success, % +[\d.]+ +[\d.]+", out, re.M)
    assert (
        len(re.findall(r"^'go to (?:the|a) \w+ (?:key|ball|box)': (?:[\w ]+, )*[\w ]+: (?:there|lost)$", out, re.M))
        == 3
    )
    with safe_open(tmp_path / "vla_policy_out" / "policy.safetensors", framework="pt") as file:
        assert "lowrank_layers" in file.metadata()
