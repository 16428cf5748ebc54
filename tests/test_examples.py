"""Every lesson and every other example runs, and does what it says."""

import math
import re
import runpy
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


def number(text):
    return float(text.replace(",", ""))


def is_drawn(path):
    return path.stat().st_size > 10_000


def test_the_course_is_numbered_from_1_to_10_and_short():
    lessons = sorted((ROOT / "examples").glob("[0-9]*.py"))
    assert [int(path.name[:2]) for path in lessons] == list(range(1, 11))
    for path in lessons:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f'"""Lesson {int(path.name[:2])}: ')
        assert f"python examples/{path.name}" in text
        assert len(text.splitlines()) < 120


def test_the_overview_names_every_example():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+\.py)`", text)) == {path.name for path in (ROOT / "examples").glob("*.py")}


def test_define(tmp_path, run):
    out = run("01_define.py", "--epochs", "12", "--out", tmp_path)
    dense, small = map(number, re.search(r"parameters +([\d,]+) +([\d,]+)", out).groups())
    # 320 and 1,290 stay; 32 * 12 + 12 * 12 * 9 + 12 * 64 + 64 and 8 * (256 + 128) + 128 are the factors with biases
    assert (dense, small) == (53_002, 320 + 2_512 + 3_200 + 1_290)
    before, after = map(float, re.search(r"read correctly, % +([\d.]+) +([\d.]+)", out).groups())
    assert min(before, after) > 90
    assert is_drawn(tmp_path / "01_define.png")


def test_compress(tmp_path, run):
    out = run("02_compress.py", "--budget", "0.3", "--epochs", "12", "--out", tmp_path)
    assert "whole model" in out
    assert "outputs identical to the bit" in out
    before, after = map(float, re.search(r"read correctly, % +([\d.]+) +([\d.]+)", out).groups())
    assert before > 95
    assert after > before - 2
    dense, small = map(number, re.search(r"parameters +([\d,]+) +([\d,]+)", out).groups())
    assert small <= 0.3 * dense
    rows = re.findall(r"^ +([\d,]+) +([\d.]+) % +([\d.]+) %$", out, re.M)
    assert all(number(size) <= share * dense for (size, *_), share in zip(rows, (0.5, 0.3, 0.1, 0.05), strict=True))
    assert float(rows[-2][1]) > float(rows[-2][2]) + 5  # a tenth of the size
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        assert "lowrank_layers" in file.metadata()
    last = out[out.index("and no slower") :]
    assert "The model stays as it is." in last or re.search(r"latency, ms +[\d.]+ +[\d.]+ +[\d.]+", last)
    assert is_drawn(tmp_path / "02_compress.png")


@pytest.mark.skipif(not available("lenet_mnist"), reason="needs lenet_mnist in LOWRANK_DATA")
def test_compress_takes_mnists_files():
    example = runpy.run_path(str(ROOT / "examples" / "digits.py"))
    x, y, x_test, y_test = example["mnist"](DATA / "lenet_mnist")
    assert (x.shape, y.shape) == ((60_000, 1, 28, 28), (60_000,))
    assert (x_test.shape, y_test.shape) == ((10_000, 1, 28, 28), (10_000,))
    model = example["build"](28)
    example["train"](model, x[:2_000], y[:2_000], epochs=1)
    assert example["accuracy"](model.eval(), x_test[:1_000], y_test[:1_000]) > 60


def test_limits(tmp_path, run):
    out = run("03_limits.py", "--epochs", "12", "--out", tmp_path)
    rows = re.findall(r"^(\S.+?)  +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+) %$", out, re.M)
    costs = {label: [number(cost) for cost in found] for label, *found in rows}
    params, nbytes, macs, right = costs["(dense)"]
    assert right > 95
    assert costs["a third of the parameters"][0] <= 0.33 * params
    assert costs["files of 60 KB"][1] <= 60_000 < nbytes
    assert costs["half of the multiplications"][2] <= 0.5 * macs
    assert costs["a predicted loss 0.05 higher"][0] < params
    # whether so small a model can gain time depends on the machine
    timed = "half the parameters, no slower"
    assert f"{timed}  not possible" in out or costs[timed][0] <= 0.5 * params
    assert is_drawn(tmp_path / "03_limits.png")


def test_recover(tmp_path, run):
    out = run("04_recover.py", "--epochs", "12", "--steps", "60", "--out", tmp_path)
    dense, before, after, _ = map(float, re.findall(r"([\d.]+) % of the test digits read correctly", out))
    assert dense > 95
    assert after > before + 3
    # the best state by this score is kept, and the state before training is one of them
    stages = re.findall(r"Budget\(params=.* ([\d.]+) +([\d.]+)(?:  the model)?$", out, re.M)
    assert len(stages) == 3
    assert all(float(recovered) >= float(factorized) for factorized, recovered in stages)
    assert is_drawn(tmp_path / "04_recover.png")


def test_convolutions(tmp_path, run):
    out = run("05_convolutions.py", "--epochs", "12", "--out", tmp_path)
    rows = [re.findall(r"([\d,]+) +([\d.]+)%", line) for line in re.findall(r"^ +\d+ +[\d,]+ +.*%$", out, re.M)]
    ranks = (4, 8, 16, 24, 32)
    for rank, ((pair, _), (tucker, _), (cp, _)) in zip(ranks, rows, strict=True):
        assert number(pair) == rank * (64 + 288 + 1)
        assert number(tucker) == rank * (64 + 32) + rank * rank * 9 + 9 + 9
        assert number(cp) == rank * (64 + 32 + 3 + 3 + 1)
    for method in zip(*rows, strict=True):
        errors = [float(error) for _, error in method]
        assert errors == sorted(errors, reverse=True)
    plans = re.findall(r"^(pairs \(SVD\)|Tucker|CP|the best of all) +([\d,]+): ([\d.]+) %", out, re.M)
    assert [label for label, *_ in plans] == ["pairs (SVD)", "Tucker", "CP", "the best of all"]
    for _, size, right in plans:  # at half of the layer's 64 * 32 * 9 + 64 parameters
        assert number(size) <= 0.5 * 18_496
        assert float(right) > 90
    assert is_drawn(tmp_path / "05_convolutions.png")


@pytest.mark.skipif(sys.platform == "win32", reason="two processes with gloo")
def test_gradients(tmp_path, run):
    out = run("07_gradients.py", "--epochs", "4", "--out", tmp_path)
    rows = re.findall(r"^(\S.+?)  +([\d,]+) bytes +([\d.]+) %   ([\d.]+) times", out, re.M)
    plain, low, coarse = ((number(sent), float(right)) for _, sent, right, _ in rows)
    assert plain[0] == 4 * (1_347 // 64) * 4 * 53_002
    assert plain[0] > 5 * low[0] > 5 * coarse[0]
    assert min(right for _, right in (plain, low, coarse)) > 90
    assert is_drawn(tmp_path / "07_gradients.png")


def test_optimizer(tmp_path, run):
    out = run("08_optimizer.py", "--epochs", "4", "--out", tmp_path)
    rows = re.findall(r"^(AdamW.*?)  +([\d,]+) bytes +([\d.]+) %$", out, re.M)
    (_, whole, right), (_, small, other) = rows
    assert number(whole) >= 2 * 4 * (64 * 512 + 512 * 512 + 512 * 10)
    assert number(small) < number(whole) / 5
    assert min(float(right), float(other)) > 85
    assert is_drawn(tmp_path / "08_optimizer.png")


def test_spectra(tmp_path, run):
    out = run("10_spectra.py", "--epochs", "12", "--out", tmp_path)
    assert re.search(r"Should fc1 be factorized, in the loss\? yes: rank \d+", out)
    assert re.search(r"\d+ directions hold 99 %", out)
    written = re.findall(r"^picture: (.+)$", out, re.M)
    assert len(written) == 7
    assert all(is_drawn(Path(name)) for name in written)


@pytest.mark.skipif(not available("pycode_llama", "text"), reason="needs pycode_llama and text in LOWRANK_DATA")
def test_lora(tmp_path, run):
    out = run("06_lora.py", "--out", tmp_path, "--model", DATA / "pycode_llama", "--steps", "4", "--batch", "2")
    assert "PiSSA disabled is the base to the bit: True" in out
    losses = [float(number) for number in re.findall(r"(?:saved and loaded|merged): held-out loss ([\d.]+)", out)]
    rows = re.findall(r"^(base|LoRA|PiSSA) +[\d,]+ +([\d.]+) +[\d.]+$", out, flags=re.M)
    table = {label: float(loss) for label, loss in rows}
    assert table["PiSSA"] < table["base"]
    assert table["LoRA"] < table["base"]
    assert losses == [table["PiSSA"]] * 2
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert is_drawn(tmp_path / "06_lora.png")


@pytest.mark.skipif(not available("pycode_llama"), reason="needs pycode_llama in LOWRANK_DATA")
def test_generate(tmp_path, run):
    options = ("--model", DATA / "pycode_llama", "--text", DATA / "pycode_llama" / "valid.txt")
    out = run("09_generate.py", *options, "--out", tmp_path, "--prompt", "512", "--tokens", "24", "--windows", "1")
    assert re.search(r"first token that differs: (none|\d+ of 24)", out)
    assert float(re.search(r"([\d.]+) times fewer bytes", out)[1]) > 2
    curves = {
        label: re.findall(r"([\d,]+) KiB: ([\d.]+)", line)
        for label, line in re.findall(r"^(exact|low rank)(.*)", out, re.M)
    }
    (exact,) = curves["exact"]
    assert float(curves["low rank"][-1][1]) == pytest.approx(float(exact[1]), rel=0.01)
    assert all(int(size.replace(",", "")) < int(exact[0].replace(",", "")) for size, _ in curves["low rank"])
    assert is_drawn(tmp_path / "09_generate.png")


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
