"""What one of two processes does in the tests of the gradient hook: many cases in one start."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr

STEPS = 50
FULL = {"rank": 10_000, "saving": 1e-6}
Case = Callable[[int], Any]


class Net(nn.Module):
    """Several matrices; some steps may leave the branch out."""

    def __init__(self, inputs: int = 32) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(inputs, 48), nn.Linear(48, 48), nn.Linear(48, 8)
        self.branch = nn.Linear(48, 48)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.first(x).relu()
        x = self.middle(x).relu() + (self.branch(x) if branch else 0)
        out: Tensor = self.last(x)
        return out


class Checkpointed(Net):
    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.first(x).relu()
        x = checkpoint(lambda x: self.middle(x).relu() + self.branch(x), x, use_reentrant=False)
        out: Tensor = self.last(x)
        return out


class Scaled(Net):
    """With a parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        return super().forward(x, branch) * self.scale


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table((x.abs() * 9).long().clamp(max=39)).mean(1))
        return out


class SparseWords(nn.Module):
    """Sparse gradients in first and last place, dense ones between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32, sparse=True)
        self.pairs = lr.LowRankEmbedding(40, 32, sparse=True, rank=5)
        self.middle, self.head = lr.LowRankLinear(32, 32, rank=16), nn.Linear(32, 8)
        self.bag = nn.EmbeddingBag(40, 8, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        index = (x.abs() * 9).long().clamp(max=39)
        out: Tensor = self.head(self.middle((self.words(index) + self.pairs(index)).mean(1)).relu())
        return out + self.bag(index) / 32


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(64, 8)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.head(self.conv(x).relu().flatten(1))
        return out


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(3, 32, 40) / 6), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.einsum("bi,eij->bj", x, self.experts).relu())
        return out


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
    """Between the processes."""
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor.contiguous())
    return max(float((other - tensor).abs().max()) for other in everywhere)


# ---- ways of training: the weights after them, with the hook (settings) or without


def plainly(kind: Callable[[], nn.Module], **ddp: Any) -> Callable[[int, dict[str, Any] | None], Tensor]:
    def way(rank: int, settings: dict[str, Any] | None) -> Tensor:
        wrapped, _ = wrap(made(kind), settings, **ddp)
        train(wrapped, batches(rank, STEPS))
        return flat(wrapped)

    return way


def unused(rank: int, settings: dict[str, Any] | None) -> Tensor:
    """In one process, in both, or in none."""
    wrapped, _ = wrap(made(), settings, find_unused_parameters=True)
    for step, pair in enumerate(batches(rank, STEPS)):
        train(wrapped, [pair], branch=step % 4 == 0 or (step % 4 == 1 and rank == 0))
    return flat(wrapped)


def joined(rank: int, settings: dict[str, Any] | None) -> Tensor:
    wrapped, _ = wrap(made(), settings)
    with Join([wrapped]):
        train(wrapped, batches(rank, STEPS - 20 * rank))
    return flat(wrapped)


def accumulated(rank: int, settings: dict[str, Any] | None) -> Tensor:
    wrapped, _ = wrap(made(), settings)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02)
    for step, (x, y) in enumerate(batches(rank, STEPS)):
        with wrapped.no_sync() if step % 3 else contextlib.nullcontext():
            nn.functional.mse_loss(wrapped(x), y).backward()
        if step % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return flat(wrapped)


def late(rank: int, settings: dict[str, Any] | None) -> Tensor:
    wrapped, state = wrap(made(), settings, hook=False)
    train(wrapped, batches(rank, 5))
    if state is not None:
        wrapped.register_comm_hook(state, lr.low_rank_hook)
    train(wrapped, batches(rank, STEPS - 5, 5))
    return flat(wrapped)


def frozen(rank: int, settings: dict[str, Any] | None) -> Tensor:
    """A layer frozen, then trained again; buckets of another size each time; one state."""
    model = made()
    state = None if settings is None else lr.LowRankCommState(model=model, **settings)
    for turn, (trains, cap) in enumerate([(True, 0.005), (False, 0.02), (True, 25)]):
        model.middle.requires_grad_(trains)
        wrapped, _ = wrap(model, None if state is None else {"state": state}, bucket_cap_mb=cap)
        train(wrapped, batches(rank, 17, 17 * turn))
    return flat(model)


WAYS: dict[str, Callable[[int, dict[str, Any] | None], Tensor]] = {
    "many_buckets": plainly(Net),
    "one_bucket": plainly(Net, bucket_cap_mb=25),
    "find_unused_parameters": unused,
    "static_graph": plainly(Net, static_graph=True),
    "gradient_as_bucket_view": plainly(Net, gradient_as_bucket_view=True),
    "activation_checkpointing": plainly(Checkpointed),
    "0_dim_parameter": plainly(Scaled),
    "embedding": plainly(Words),
    "sparse_gradients": plainly(SparseWords),
    "sparse_gradients_as_bucket_view": plainly(SparseWords, gradient_as_bucket_view=True, static_graph=True),
    "channels_last": plainly(Picture),
    "experts": plainly(Experts),
    "join": joined,
    "no_sync": accumulated,
    "late_registration": late,
    "frozen_and_changed_buckets": frozen,
}

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


def ways(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, way in WAYS.items():
        plain, low, full = way(rank, None), way(rank, {"rank": 2}), way(rank, FULL)
        integers = way(rank, {"rank": 2, "wire": torch.int8, "error_dtype": torch.int8})
        scale = float(plain.abs().max())
        out[name] = {
            "integers": difference(integers),
            "integers_to_low": float((integers - low).abs().max()) / scale,
            "low": difference(low),
            "full": difference(full),
            "to_plain": float((full - plain).abs().max()) / scale,
            "low_to_plain": float((low - plain).abs().max()) / scale,
        }
    return out


def settings(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, given in SETTINGS.items():
        wrapped, state = wrap(made(), given)
        train(wrapped, batches(rank, STEPS))
        x, y = batches(5, 1)[0]
        loss = float(nn.functional.mse_loss(wrapped.module(x), y).detach())
        out[name] = {"difference": difference(flat(wrapped)), "loss": loss, "stats": state.stats()}
        out[name]["conserved"] = conserved(rank, given)
    return out


def conserved(rank: int, given: dict[str, Any], branch: bool = False) -> float:
    """All gradients are applied or still owed, in part of their size."""
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
    lost = 0.0
    for name, total in true.items():
        memory = state.memories.get(name)
        owed = 0 if memory is None else memory.error.float().view(total.shape)
        parts = torch.stack([total - owed, total])
        dist.all_reduce(parts)
        parts /= dist.get_world_size()
        lost = max(lost, float((applied[name] - parts[0]).norm() / parts[1].norm()))
    return lost


def caught(case: Case, rank: int) -> Any:
    try:
        return case(rank)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}


def run_all(rank: int) -> dict[str, Any]:
    from . import hook_cases

    out = {"ways": caught(ways, rank), "settings": caught(settings, rank)}
    return out | {name: caught(case, rank) for name, case in hook_cases.CASES.items()}
