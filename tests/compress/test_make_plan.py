"""The arguments of make_plan."""

from __future__ import annotations

import pytest
from torch import nn

import lowrank_layers as lr


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_where_it_is_asked_for(progress, capsys):
    lr.make_plan(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), lr.Budget(params=0.5), progress=progress)
    assert ("2/2" in capsys.readouterr().err) is progress
