"""Every process gets the statistics of all the data, of which it has seen a part."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowrank_layers as lr

from ..processes import run_processes
from .merge_cases import Energy, assert_equal, cases, shown

WORLD = 2


def reduced(rank: int, folder: str) -> dict[str, object]:
    """What one process gets, whose part is every second batch."""
    found: dict[str, object] = {}
    for name, (model, batches, options) in cases().items():
        own = lr.calibrate(model, batches[rank::WORLD], Energy(), **options)
        found[name] = own.all_reduce()
    # moments that two layers share, in a file in one process and with a function as mask in the other
    layer = own["head"]
    shared = lr.Statistics({"q": layer, "k": copy.copy(layer)}, samples=own.samples)
    if rank == 0:
        shared.save(f"{folder}/stats.safetensors")
        shared = lr.Statistics.load(f"{folder}/stats.safetensors")
    else:
        shared.mask = lambda batch: batch > 0
    both = shared.all_reduce()
    same = torch.equal(both["q"].inputs.second, found["bags"]["head"].inputs.second)
    found["shared"] = both["q"].inputs is both["k"].inputs, same
    found["mask"] = both.mask is shared.mask
    # the second process has no data, and then other layers
    model, batches, options = cases()["bags"]
    one = lr.calibrate(model, batches, Energy()) if rank == 0 else lr.Statistics()
    found["empty"] = one.all_reduce()
    try:
        lr.calibrate(model, batches, Energy(), target=["bag"] if rank else None).all_reduce()
    except lr.LowRankError as error:
        found["error"] = str(error)
    group = dist.new_group([rank], use_local_synchronization=True)
    found["alone"] = own.all_reduce(group)
    return found


def test_every_process_has_the_whole(tmp_path):
    ranks = run_processes(reduced, tmp_path / "ranks", str(tmp_path), world=WORLD)
    for name, (model, batches, options) in cases().items():
        in_order = [batch for rank in range(WORLD) for batch in batches[rank::WORLD]]
        whole = lr.calibrate(model, in_order, Energy(), **options)
        for found in ranks:
            assert_equal(found[name], whole)
            assert found[name].mask == whole.mask
            assert shown(found[name].example) == shown(whole.example)
            for layer, stats in found[name].items():  # to the last bit: plans have to agree
                assert torch.equal(stats.inputs.second, ranks[0][name][layer].inputs.second)
                if stats.gradients is not None:
                    assert torch.equal(stats.gradients, ranks[0][name][layer].gradients)
    model, batches, options = cases()["bags"]
    for rank, found in enumerate(ranks):
        assert found["shared"] == (True, True)
        assert found["mask"]
        assert_equal(found["empty"], lr.calibrate(model, batches, Energy()))
        assert "different layers, of which 'head' is in one part only" in found["error"]
        assert_equal(found["alone"], lr.calibrate(model, batches[rank::WORLD], Energy()))


def test_needs_a_process_group():
    stats = lr.calibrate(nn.Linear(4, 4), [torch.randn(3, 4)])
    with pytest.raises(lr.LowRankError, match=r"call dist.init_process_group first"):
        stats.all_reduce()
