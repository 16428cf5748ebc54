"""Projections in two processes: equal weights, and projectors from the factors of the hook."""

import pytest
import torch

from tests.processes import run_processes

from . import worker
from .common import METHODS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found in each case."""
    return run_processes(worker.run, tmp_path_factory.mktemp("projection"))


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_have_the_same_weights(results, method):
    first, second = (process[method] for process in results)
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("hook_rank", worker.HOOK_RANKS)
def test_the_factors_of_the_hook_give_the_projectors(results, hook_rank):
    got, other = (process[hook_rank] for process in results)
    assert torch.equal(got["weights"], other["weights"])
    assert got["orthonormal"] < 1e-5
    assert got["fits"] == [worker.STEPS // 2] * 2
    assert got["losses"][-1] < 0.9 * got["losses"][0]
    # whatever the hook sends is in the projection if its rank is at most that of the projection
    assert max(got["lost"]) < 1e-5
