"""Runs that pause, and what they ask the thread that waits for them to compute."""

from __future__ import annotations

import threading

import pytest
import torch

from lowrank_layers.calibrate.paused_run import PausedRun, in_resuming_thread, pause


def test_a_run_computes_in_the_thread_that_waits_where_it_asks_to():
    seen = []

    def run() -> None:
        seen.append(threading.get_ident())
        for place in ("first", "second"):
            seen.append(in_resuming_thread(threading.get_ident))
            pause(place)

    paused = PausedRun(run)
    assert [paused.resume(), paused.resume(), paused.resume()] == ["first", "second", None]
    assert seen[0] != threading.get_ident()
    assert seen[1:] == [threading.get_ident()] * 2


@pytest.mark.parametrize("gradients", [False, True])
def test_what_it_asks_for_sees_the_gradients_and_autocast_of_the_run(gradients):
    x = torch.ones(3, 3)
    got = []

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            got.append(in_resuming_thread(lambda: (torch.is_grad_enabled(), (x @ x).dtype)))

    PausedRun(run, gradients=gradients).resume()
    assert got == [(gradients, torch.bfloat16)]
    assert torch.is_grad_enabled()
    assert (x @ x).dtype == torch.float32


def test_errors_are_raised_where_it_was_asked():
    def fail() -> None:
        raise KeyError("lost")

    caught = []

    def run() -> None:
        try:
            in_resuming_thread(fail)
        except KeyError as error:
            caught.append(error)
        in_resuming_thread(fail)

    with pytest.raises(KeyError, match="lost"):
        PausedRun(run).resume()
    assert len(caught) == 1


def test_outside_of_runs_functions_are_called_at_once():
    assert in_resuming_thread(threading.get_ident) == threading.get_ident()
