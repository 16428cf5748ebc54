"""A device as a budget: memory as bytes, time as MACs where its speed is known and as time where it is measured."""

from __future__ import annotations

from datetime import timedelta

import pytest

import lowrank_layers as lr


@pytest.mark.parametrize(
    ("device", "limits", "budget"),
    [
        (lr.Device(memory=10**8), {}, lr.Budget(bytes=10**8)),
        (lr.Device(memory=10**8), {"latency": 0.5}, lr.Budget(bytes=10**8, latency=0.5)),
        (lr.Device(), {"latency": timedelta(seconds=1)}, lr.Budget(latency=timedelta(seconds=1))),
        (lr.Device(10**8, 3e9), {"latency": timedelta(milliseconds=2)}, lr.Budget(bytes=10**8, macs=6_000_000)),
        (lr.Device(macs_per_second=3e9), {"latency": 0.5, "loss": 0.1}, lr.Budget(macs=0.5, loss=0.1)),
    ],
    ids=repr,
)
def test_a_device_is_a_budget(device, limits, budget):
    assert device.budget(**limits) == budget


@pytest.mark.parametrize("values", [{"memory": 0}, {"memory": "2 MB"}, {"macs_per_second": float("nan")}], ids=str)
def test_devices_that_are_none_are_refused(values):
    with pytest.raises(lr.BudgetError, match="Device: got"):
        lr.Device(**values)


def test_a_device_without_limits_has_no_budget():
    with pytest.raises(lr.BudgetError, match="got no limit"):
        lr.Device(macs_per_second=1e9).budget()
