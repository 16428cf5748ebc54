"""The whole calls that a public docstring, README or docs/ names run."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .promises import PROMISES, ROOT, Promise, parsed, resolve


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def adapted() -> nn.Module:
    return lr.add_lora_(small(), rank=2)


MAKERS = {
    "model": adapted,
    "optimizer": lambda: torch.optim.AdamW(small().parameters()),
    "stats": lambda: lr.calibrate(small(), [torch.randn(4, 8)]),
    "gradients": lambda: lr.weight_gradients(small(), [(torch.randn(4, 8), torch.randn(4, 8))], nn.functional.mse_loss),
    "reference": small,
    "teacher": small,
    "state": lambda: lr.LowRankCommState(rank=4),
    "ddp": lambda: nn.parallel.DistributedDataParallel(small()),
    "t": lambda: torch.randn(2, 3, 4),
    "k": lambda: 1,
    "bias": lambda: True,
} | dict.fromkeys(
    [
        *("rank", "rank_in", "rank_out", "in_channels", "out_channels", "groups", "kernel_size", "kh", "kw", "kd"),
        *("num_embeddings", "embedding_dim", "in_features", "out_features", "embed_dim", "kdim", "vdim"),
    ],
    lambda: 4,
)
"""What the variables of promised calls stand for, made anew for every call."""

ELSEWHERE = {
    "model.set_attn_implementation": "tests/kv_cache/transformers/test_cache.py",
    "factorize_kv_": "tests/kv_cache/transformers/test_factorize_kv.py",
    "absorb_mla_": "tests/kv_cache/transformers/test_mla.py",
    "lr.attach_low_rank_reduce": "tests/distributed/fsdp_worker.py",
}
"""Calls that need a transformers model or a group of processes, and the tests that run them."""


def runnable() -> list[Promise]:
    """Promises that are one whole call of this library, of torch.nn, or of an object in ``MAKERS``."""
    found = []
    for promise in PROMISES:
        tree = parsed(promise.code)
        call = tree.body if tree is not None else None
        if not isinstance(call, ast.Call) or ast.unparse(call.func) == "_" or "..." in ast.unparse(call):
            continue
        function, root = resolve(call.func, promise.owner), ast.unparse(call.func).partition(".")[0]
        ours = getattr(inspect.getmodule(function), "__name__", "").startswith(("lowrank_layers", "torch.nn"))
        if (ours and complete(function, call)) or (
            function is None and root in MAKERS and "." in ast.unparse(call.func)
        ):
            found.append(promise)
    return found


def complete(function: Any, call: ast.Call) -> bool:
    """Whether the text names every argument that has to be given, and not only the one it speaks of."""
    try:
        inspect.signature(function).bind(*call.args, **{str(keyword.arg): 0 for keyword in call.keywords})
    except TypeError:
        return False
    return True


@pytest.fixture
def one_process():
    """A group of this process alone, for what is promised of DDP."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("promise", runnable(), ids=str)
@pytest.mark.usefixtures("one_process")
def test_named_calls_run(promise):
    tree = parsed(promise.code)
    name = ast.unparse(tree.body.func)
    if name in ELSEWHERE:
        assert name.rpartition(".")[2] in (ROOT / ELSEWHERE[name]).read_text(encoding="utf-8")
        return
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = {key: make() for key, make in MAKERS.items() if key in names}
    scope = vars(inspect.getmodule(promise.owner) or lr) | {"lr": lr, "nn": nn, "torch": torch}
    scope |= {key: getattr(lr, key) for key in names & set(lr.__all__)}
    eval(compile(tree, promise.where, "eval"), scope, values)
