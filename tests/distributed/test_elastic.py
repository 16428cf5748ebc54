"""A worker is killed in the middle of an epoch; torchrun starts all again, and nothing of it shows in the weights."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import ddp_cifar
from tests.processes import run_processes

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--data=random", "--batch=8", "--epochs=2", "--every=9", "--lr=0.02"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo, and SIGKILL")


def uninterrupted(rank, options, folder):
    """In processes that are there already, without torchrun."""
    ddp_cifar.train(ddp_cifar.arguments([*OPTIONS, *options, "--out", str(folder)]))


def start(folder, options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    command = (sys.executable, *run, str(ROOT / "examples" / "ddp_cifar.py"), *OPTIONS, *options, "--out", str(folder))
    folder.mkdir()
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, folder):
    try:
        code = process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    log = (folder / "log").read_text()
    assert code == 0, log[-3000:]
    return log


def result(folder, steps):
    """The last checkpoint, of that many steps."""
    (checkpoint,) = folder.glob("step*")
    assert checkpoint.name == f"step{steps:08}"
    return torch.load(checkpoint / "model.pt", weights_only=True)


def kill_after_a_checkpoint(process, folder, victim):
    """SIGKILL to one worker once the first checkpoint is there, with the parts of both."""
    end = time.monotonic() + 120
    parts = ("model.pt", "hook0.pt", "hook1.pt")
    while not any(all((step / part).exists() for part in parts) for step in folder.glob("step*")):
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.005)
    pid = re.search(rf"process {victim} has the id (\d+)", (folder / "log").read_text())[1]
    os.kill(int(pid), signal.SIGKILL)


MODELS = {
    "small": (60, ["--images=480", "--model=small", "--rank=2"]),
    "resnet20": (30, ["--images=240", "--model=resnet20", "--wire=int8"]),
}


@pytest.mark.parametrize(("steps", "options"), MODELS.values(), ids=MODELS)
def test_a_killed_worker_leaves_no_trace(tmp_path, steps, options):
    run_processes(uninterrupted, tmp_path / "processes", options, tmp_path / "whole")
    process = start(tmp_path / "killed", options)
    kill_after_a_checkpoint(process, tmp_path / "killed", victim=1)
    log = finish(process, tmp_path / "killed")
    resumed = [int(step) for step in re.findall(r"goes on after step (\d+)", log)]
    assert len(resumed) == 2, log[-3000:]
    assert resumed[0] == resumed[1]
    assert 0 < resumed[0] < steps
    whole, killed = (result(tmp_path / run, steps) for run in ("whole", "killed"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, killed["model"][name]), name
    momentum = [run["optimizer"]["state"] for run in (whole, killed)]
    assert all(torch.equal(momentum[0][k]["momentum_buffer"], momentum[1][k]["momentum_buffer"]) for k in momentum[0])
