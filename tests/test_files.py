"""Tensors that are kept in files, and the memory that they take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowrank_layers.memory import SPILLED, in_memory, release_mapped, spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_spilled_tensor_is_a_copy_without_a_name(dtype, tmp_path):
    tensor = torch.randint(0, 2, (3, SPILLED)).to(dtype)
    copy = spilled(tensor, tmp_path)
    want = tensor.clone()
    tensor.zero_()
    assert copy.dtype == dtype
    assert torch.equal(copy, want)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tensor", [torch.ones(3), torch.ones(SPILLED, 2).mT, torch.empty(0)], ids=["small", "strided", "empty"]
)
def test_other_tensors_are_copied_in_memory(tensor, tmp_path):
    copy = spilled(tensor, tmp_path)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_spilled_tensor_takes_memory_only_while_it_is_looked_at(tmp_path):
    tensor = torch.ones(64, 1 << 18)  # 64 MiB
    before = resident()
    copy = spilled(tensor, tmp_path)
    kept = resident()
    assert float(copy.sum()) == tensor.numel()
    looked_at = resident()
    release_mapped([copy])
    assert kept - before < 16 << 20
    assert looked_at - kept > 48 << 20
    assert resident() - kept < 16 << 20
    assert float(copy.sum()) == tensor.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_neither_way_takes_memory_for_both_copies(tmp_path):
    tensor = torch.ones(64, 1 << 18)  # 64 MiB
    before = resident(forget_peak=True)
    copy = spilled(tensor, tmp_path)
    assert peak() - before < 40 << 20
    before = resident(forget_peak=True)
    again = in_memory(copy)
    assert peak() - before < 104 << 20
    assert resident() - before < 72 << 20  # the copy is in its file again
    assert torch.equal(again, tensor)


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(SPILLED, 2).mT], ids=["small", "strided"])
def test_what_was_copied_in_memory_is_copied_again(tensor, tmp_path):
    copy = spilled(tensor, tmp_path)
    again = in_memory(copy)
    assert torch.equal(again, tensor)
    assert again.data_ptr() != copy.data_ptr()


def peak() -> int:
    """The most bytes of this process in memory since the peak was forgotten."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident(*, forget_peak: bool = False) -> int:
    """Bytes of this process in memory."""
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
