"""Every setting trains, keeps processes equal and loses nothing; wrong ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .cases import batches, difference, flat, lost, made, train, wrap

EXACT, TIGHT = 0.0, 1e-5
STEPS = 50
SETTINGS: dict[str, dict[str, Any]] = {
    "alternate": {"rank": 2, "alternate": True},
    "refresh": {"rank": 2, "refresh": 7},
    "cold": {"rank": 2, "warm_start": False},
    "no_error_feedback": {"rank": 2, "error_feedback": False},
    "error_dtype_bf16": {"rank": 2, "error_dtype": torch.bfloat16},
    "wire_bf16": {"rank": 2, "wire": torch.bfloat16},
    "wire_fp16": {"rank": 2, "wire": torch.float16},
    "wire_int8": {"rank": 2, "wire": torch.int8},
    "wire_int8_alternate": {"rank": 2, "wire": torch.int8, "alternate": True},
    "error_dtype_int8": {"rank": 2, "error_dtype": torch.int8},
    "no_local_iterations": {"rank": 2, "local_iterations": 0},
    "budget": {"rank": lr.Budget(bytes=3000)},
    "fallback_fp16": {"rank": 2, "fallback": torch.float16},
    "energy": {"rank": lr.Energy(0.9)},
    "evbmf": {"rank": lr.EVBMF()},
    "start_step": {"rank": 2, "start_step": 9},
    "fallback": {"rank": 2, "fallback": True},
    "rank_1": {"rank": 1},
}


def case_settings(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, given in SETTINGS.items():
        wrapped, state = wrap(made(), given)
        train(wrapped, batches(rank, STEPS))
        x, y = batches(5, 1)[0]
        loss = float(nn.functional.mse_loss(wrapped.module(x), y).detach())
        out[name] = {"difference": difference(flat(wrapped)), "loss": loss, "stats": state.stats()}
        out[name]["lost"] = lost(rank, given)
    return out


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(seen, setting):
    # vectors have 16 bits on a wire of int8
    limits = {"wire_bf16": 1e-2, "wire_fp16": 1e-2, "error_dtype_bf16": 1e-2, "error_dtype_int8": 5e-2}
    limits |= {"wire_int8": 1e-4, "wire_int8_alternate": 1e-4, "fallback_fp16": 1e-2}
    for process in seen:
        got = process[setting]
        assert got["difference"] == EXACT
        assert got["loss"] < 32  # 36 at the start
        if setting == "no_error_feedback":
            assert got["lost"] > 0.1
        else:
            assert got["lost"] < limits.get(setting, TIGHT)
        assert got["stats"]["steps"] == STEPS
        assert got["stats"]["ratio"] > (1.0 if setting.startswith("fallback") else 1.5)


BAD = {
    "rank": {"rank": 0},
    "budget": {"rank": lr.Budget(params=0.5)},
    "of": {"rank": lr.Budget(bytes=0.5, of="planned")},
    "start_step": {"start_step": -1},
    "refresh": {"refresh": 0},
    "local_iterations": {"local_iterations": True},
    "wire": {"wire": torch.float64},
    "error_dtype": {"error_dtype": torch.float16},
    "saving": {"saving": 0},
    "saving NaN": {"saving": float("nan")},
    "fallback": {"fallback": torch.int8},
    "scaler": {"scaler": 2.0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    with pytest.raises(lr.LowRankError, match=r"(PowerSGDSettings|LowRankCommState): got .*, expected"):
        lr.LowRankCommState(**BAD[name])


def test_settings_are_taken_whole_or_by_name():
    whole = lr.PowerSGDSettings(rank=2, start_step=7)
    assert lr.LowRankCommState(whole).settings == whole
    assert lr.LowRankCommState(whole, start_step=3).settings == lr.PowerSGDSettings(rank=2, start_step=3)
    assert lr.LowRankCommState(rank=2, start_step=7).settings == lr.LowRankCommState(2, start_step=7).settings == whole
    assert lr.LowRankCommState().settings == lr.PowerSGDSettings()


def test_an_unknown_setting_is_refused_with_the_closest_one():
    message = "got star_step=.* did you mean start_step="
    with pytest.raises(lr.LowRankError, match=message):
        lr.LowRankCommState(star_step=3)
    with pytest.raises(lr.LowRankError, match=message):
        lr.attach_low_rank_reduce(nn.Linear(2, 2), replicate_group=None, star_step=3)
