"""Commands hold a few tensors at a time, not a checkpoint: the peak of resident memory grows by less than the file."""

from pathlib import Path

import pytest
import torch

from .files import run_json, write_sharded

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LAYERS, ROWS, COLUMNS = 24, 128, 8192
SIZE = 4 * LAYERS * ROWS * COLUMNS


def kilobytes(field: str) -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


def growth(capsys: pytest.CaptureFixture[str], *argv: object) -> int:
    """Bytes of resident memory that a command needs beyond what the process has already."""
    try:
        RESET.write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    before = kilobytes("VmRSS:")
    run_json(capsys, *argv)
    return 1024 * (kilobytes("VmHWM:") - before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of 100 MB, and one in which two matrices changed."""
    path = tmp_path_factory.mktemp("large")
    state = {f"layers.{k}.weight": torch.randn(ROWS, COLUMNS) for k in range(LAYERS)}
    base = write_sharded(state, path / "base", shards=3)
    for k in (0, 1):
        state[f"layers.{k}.weight"] += torch.randn(ROWS, 2) @ torch.randn(2, COLUMNS)
    return base, write_sharded(state, path / "tuned", shards=3)


def test_two_checkpoints_are_compared_tensor_by_tensor(folders, tmp_path, capsys):
    assert growth(capsys, "extract-lora", *folders, tmp_path / "adapter", "--rank=2") < SIZE


def test_a_checkpoint_is_planned_layer_by_layer(folders, tmp_path, capsys):
    assert growth(capsys, "inspect", folders[0]) < SIZE


def test_a_checkpoint_is_written_tensor_by_tensor(folders, tmp_path, capsys):
    argv = "--rank=8", "--exclude", r"layers\.(\d|1\d)$"
    assert growth(capsys, "apply", folders[0], tmp_path / "out.safetensors", *argv) < SIZE
