"""What one of four processes, two replicas of two shards each, does in the tests of FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lowrank_layers as lr

WORLD = 4
WHOLE = {"rank": 10**6, "saving": 1e-9}
"""Factors of full rank, sent as factors all the same."""


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.value = nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + nn.functional.scaled_dot_product_attention(y, y, self.value(y))
        return x + self.down(self.up(x).relu())


class Odd(nn.Module):
    """Shards that are padded or empty, a convolution, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 7, 3)
        self.branch, self.other = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 1)

    def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
        x = self.conv(x).mean(-1)
        x = self.branch(x).tanh() + (self.other(x) if both else 0)
        return self.head(x)


def transformer() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), Block(32), Block(32), nn.Linear(32, 5))


def frozen_first() -> nn.Module:
    model = transformer()
    model[0].requires_grad_(False)
    return model


def sharded(model: nn.Module, mesh: DeviceMesh, **more: Any) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def build(make: Any, mesh: DeviceMesh | None, **more: Any) -> nn.Module:
    """A sharded model with seeded weights: over a mesh of shards for ours, of replicas and shards for native HSDP."""
    torch.manual_seed(0)
    return sharded(make(), mesh, **more)


def task(step: int, rank: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and the index of the largest feature as the class."""
    x = torch.randn(size, 4, 12, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, x[..., :5].argmax(-1)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        x, y = task(step, dist.get_rank())
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / WORLD
        dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def full(model: nn.Module, *, gradients: bool = False) -> dict[str, torch.Tensor | None]:
    """Unsharded parameters or gradients, by name."""
    found: dict[str, torch.Tensor | None] = {}
    for name, p in model.named_parameters():
        tensor = p.grad if gradients else p.detach()
        found[name] = tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
    return found


def apart(model: nn.Module, group: dist.ProcessGroup) -> float:
    """The greatest difference of a parameter between replicas."""
    worst = 0.0
    for p in model.parameters():
        high, low = p.to_local().detach().clone().float(), p.to_local().detach().clone().float()
        dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
        dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
        worst = max(worst, float((high - low).max()) if high.numel() else 0.0)
    return worst


def refusal(call: Any) -> str:
    try:
        call()
    except lr.LowRankError as error:
        return str(error)
    return "nothing was refused"


class Cases:
    """The cases, each by a method; a case returns what the test looks at."""

    def __init__(self) -> None:
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.shards, self.group = self.mesh["shard"], self.mesh["replicate"].get_group()
        self.replica = self.group.rank()

    def ours(self, make: Any, policy: Any = None, **settings: Any) -> tuple[nn.Module, lr.LowRankReduceState]:
        model = build(make, self.shards, **({} if policy is None else {"mp_policy": policy}))
        return model, lr.attach_low_rank_reduce(model, replicate_group=self.group, **settings)

    def curves(self) -> dict[str, Any]:
        native = build(transformer, self.mesh)
        expected = learn(native, torch.optim.Adam(native.parameters(), lr=5e-3), 32)
        model, state = self.ours(transformer)
        got = learn(model, torch.optim.Adam(model.parameters(), lr=5e-3), 32)
        return {"native": expected, "low": got, "apart": apart(model, self.group), "stats": state.stats()}

    def whole(self) -> dict[str, Any]:
        native = build(transformer, self.mesh)
        learn(native, torch.optim.SGD(native.parameters(), lr=0.1), 8)
        found = {}
        for name, settings in {"factors": WHOLE, "sent whole": {"rank": 10**6}, "late": {"start_step": 99}}.items():
            model, state = self.ours(transformer, **settings)
            learn(model, torch.optim.SGD(model.parameters(), lr=0.1), 8)
            found[name] = (full(model), len(state.stats()["layers"]), apart(model, self.group))
        return {"native": full(native), "ours": found}

    def variants(self) -> dict[str, Any]:
        """Other settings, which have to learn and to keep replicas equal."""
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        ways = {
            "alternate": (None, {"alternate": True}),
            "rule": (None, {"rank": lr.Energy(0.9), "start_step": 2}),
            "bf16": (bf16, {}),
            "bf16 reduced": (MixedPrecisionPolicy(reduce_dtype=torch.bfloat16), {"error_dtype": torch.bfloat16}),
            "int8": (None, {"wire": torch.int8, "error_dtype": torch.int8}),
            "budget": (None, {"rank": lr.Budget(bytes=0.5)}),
            "budget, frozen": (None, {"rank": lr.Budget(bytes=0.5)}),
        }
        found = {}
        for name, (policy, settings) in ways.items():
            model, state = self.ours(frozen_first if "frozen" in name else transformer, policy, **settings)
            losses = learn(model, torch.optim.Adam(model.parameters(), lr=5e-3), 15)
            found[name] = (losses, apart(model, self.group), state.stats()["steps"], state.stats()["ratio"])
        return found

    def bytes(self) -> dict[str, Any]:
        model, state = self.ours(lambda: nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024)))
        for _ in range(2):
            model(torch.randn(4, 512)).square().mean().backward()
        return state.stats()

    def start(self) -> dict[str, Any]:
        """Replicas that start with different weights."""
        torch.manual_seed(self.replica)
        model = nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9)).bfloat16()
        model[1].running_mean.fill_(self.replica)
        fully_shard(model, mesh=self.shards)
        before = apart(model, self.group)
        lr.attach_low_rank_reduce(model, replicate_group=self.group)
        return {"before": before, "after": apart(model, self.group), "buffer": model[1].running_mean}

    def accumulated(self) -> dict[str, Any]:
        """Micro-batches: gradients held back before the reduction, or after it."""
        found = {}
        for switch in ("set_requires_gradient_sync", "set_requires_all_reduce"):
            for name in ("native", "ours"):
                model = build(transformer, self.mesh) if name == "native" else self.ours(transformer, **WHOLE)[0]
                for step in range(6):
                    last = step % 3 == 2
                    getattr(model, switch)(last)
                    model.set_is_last_backward(last)
                    x, y = task(step, dist.get_rank())
                    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
                    if last:
                        found[switch, name, step] = full(model, gradients=True)
                        model.zero_grad()
        return found

    def unused(self) -> dict[str, Any]:
        """A branch that all replicas leave out at times; and one that each leaves out at other times."""
        x = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(dist.get_rank()))
        found: dict[str, Any] = {}
        for name in ("native", "ours"):
            model = build(Odd, self.mesh) if name == "native" else self.ours(Odd, **WHOLE)[0]
            for step in range(4):
                model.zero_grad()
                model(x, both=step % 2 == 0).square().sum().backward()
                found[name, step] = full(model, gradients=True)
        model, state = self.ours(Odd, rank=1)
        model.set_reduce_scatter_unused_params(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(6):
            model(x, both=(step + dist.get_rank()) % 2 == 0).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found["apart"], found["layers"] = apart(model, self.group), state.stats()["layers"]
        return found

    def not_finite(self) -> dict[str, Any]:
        """A gradient that is not finite, in the second step and in one replica only."""
        model, state = self.ours(transformer)
        remembered, gradients = [], []
        for step in range(3):
            model.zero_grad()
            x, y = task(step, dist.get_rank())
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            (loss * (float("inf") if step == 1 and self.replica == 1 else 1)).backward()
            remembered.append({key: tensor for key, tensor in state.state_dict().items() if "error." in key})
            gradients.append(all(bool(p.grad.to_local().isfinite().all()) for p in model.parameters()))
        return {"errors": remembered, "finite": gradients}

    def order(self) -> dict[str, Any]:
        seen, reduce = [], lr.LowRankReduceState.reduce_

        def watched(state: lr.LowRankReduceState, unit: Any, flat: torch.Tensor) -> None:
            seen.append(unit.name)
            reduce(state, unit, flat)

        lr.LowRankReduceState.reduce_ = watched  # type: ignore[method-assign]
        model, state = self.ours(transformer)
        lr.LowRankReduceState.reduce_ = reduce  # type: ignore[method-assign]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learn(model, optimizer, 2)
        steps = [state.stats()["steps"]]
        state.load_state_dict(state.state_dict() | {"step": torch.tensor(10)})
        learn(model, optimizer, 1)
        return {"names": seen, "steps": [*steps, state.stats()["steps"]]}

    def refused(self) -> dict[str, str]:
        def attach(model: nn.Module, group: Any = self.group, **more: Any) -> Any:
            return lambda: lr.attach_low_rank_reduce(model, replicate_group=group, **more)

        one = build(transformer, self.shards)
        part = transformer()
        fully_shard(part[1], mesh=self.shards)
        found = {
            "2-d": refusal(attach(build(transformer, self.mesh))),
            "plain": refusal(attach(transformer())),
            "part": refusal(attach(part)),
            "world": refusal(attach(one, dist.group.WORLD)),
            "shards": refusal(attach(one, self.shards.get_group())),
            "none": refusal(attach(one, None)),
            "rank": refusal(attach(one, rank=0)),
            "settings": refusal(attach(one, rank=2 + self.replica)),
            "other model": refusal(attach(build(lambda: nn.Linear(8, 8 + self.replica), self.shards))),
        }
        with torch.device("meta"):
            empty = transformer()
        found["meta"] = refusal(attach(sharded(empty, self.shards)))
        version = torch.__version__
        for age, other in {"newer": "3.1.0", "older": "2.10.0"}.items():
            torch.__version__ = torch.torch_version.TorchVersion(other)
            found[age] = refusal(attach(one))
        torch.__version__ = version
        state = attach(one)()
        found["twice"] = refusal(attach(one))
        found["ddp"] = refusal(lambda: lr.low_rank_hook(state, None))
        return found


CASES = [name for name in vars(Cases) if name[0] != "_" and name != "ours"]


def run(rank: int) -> dict[str, Any]:
    """What each case found."""
    cases = Cases()
    return {name: getattr(cases, name)() for name in CASES}
