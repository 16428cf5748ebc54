"""Tensors that are kept in files, and the memory that they take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowrank_layers.memory import SPILLED, release_mapped, spilled


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


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
