"""What the processes of these tests do: they train small models with the hook and compare themselves.

A test file has functions ``case_<name>(rank)``; all of them run in one start of two processes, since a start takes
longer than a case, and ``test_<name>`` gets the results of both from the fixture ``seen``.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_layers as lr

from .models import Net

FULL = {"rank": 10_000, "saving": 1e-6}
"""Factors of full rank, sent as factors all the same."""


def run_cases(rank: int, module: str) -> dict[str, Any]:
    """The results of a test file's cases by name."""
    found = vars(importlib.import_module(module)).items()
    return {name.removeprefix("case_"): caught(case, rank) for name, case in found if name.startswith("case_")}


def caught(case: Callable[[int], Any], rank: int) -> Any:
    try:
        return case(rank)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}


def made(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def wrap(
    model: nn.Module, settings: dict[str, Any] | None, hook: bool = True, **ddp: Any
) -> tuple[DistributedDataParallel, Any]:
    wrapped = DistributedDataParallel(model, **{"bucket_cap_mb": 0.005, **ddp})
    if settings is None:
        return wrapped, None
    state = settings["state"] if "state" in settings else lr.LowRankCommState(model=model, **settings)
    if hook:
        wrapped.register_comm_hook(state, lr.low_rank_hook)
    return wrapped, state


def batches(rank: int, steps: int, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    out = []
    target = torch.randn(32, 8, generator=torch.Generator().manual_seed(7))
    for step in range(first, first + steps):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1000 * rank + step))
        out.append((x, x @ target))
    return out


def train(wrapped: nn.Module, data: list[tuple[Tensor, Tensor]], optimizer: Any = None, **options: Any) -> None:
    optimizer = optimizer or torch.optim.SGD(wrapped.parameters(), lr=0.02)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x, **options), y).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def difference(tensor: Tensor) -> float:
    """The greatest difference between the processes."""
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.contiguous())
    return max(float((other - tensor).abs().max()) for other in everywhere)


def layers(state: Any) -> list[str]:
    """The names of compressed gradients."""
    return sorted(state.stats()["layers"])


def errors(state: Any) -> dict[str, Tensor]:
    """This process's errors by parameter name."""
    own = f"process{dist.get_rank()}.error."
    return {key.removeprefix(own): value for key, value in state.state_dict().items() if key.startswith(own)}


def lost(rank: int, given: dict[str, Any], branch: bool = False) -> float:
    """The part of all gradients that is neither applied nor remembered as an error."""
    model = made()
    wrapped, state = wrap(model, given, find_unused_parameters=branch)
    alone = made()
    applied: dict[str, Tensor] = {}
    true: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(batches(rank, 8)):
        options = {"branch": step % 3 != 2} if branch else {}
        for net, sums in ((wrapped, applied), (alone, true)):
            net.zero_grad()
            nn.functional.mse_loss(net(x, **options), y).backward()
            inner = model if net is wrapped else net
            for name, p in inner.named_parameters():
                if p.grad is not None:
                    sums[name] = sums.get(name, 0) + p.grad.clone()
    remembered, worst = errors(state), 0.0
    for name, total in true.items():
        owed = remembered[name].float().view(total.shape) if name in remembered else 0
        parts = torch.stack([total - owed, total])
        dist.all_reduce(parts)
        parts /= dist.get_world_size()
        worst = max(worst, float((applied[name] - parts[0]).norm() / parts[1].norm()))
    return worst
