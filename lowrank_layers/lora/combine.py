"""Several adapters of a model into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..linalg import exact_svd
from .adapter import Adapter, Bank
from .inject import banks, check_name, use_adapter
from .kinds import Kernel, Kind

How = Literal["linear", "concatenation", "svd", "ties", "dare"]


@torch.no_grad()
def combine_lora_(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    how: How = "svd",
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> nn.Module:
    r"""Adds one more adapter, the weighted sum of others, in place; they stay, and only the new one is in use.

    Args:
        model: an adapted model.
        weights: adapter to weight.
        name: of the new one.
        how: ``"concatenation"`` (exact, ranks add up), ``"svd"`` (the best of rank ``rank``, by QR of the factors: the
            deltas are never formed), ``"linear"`` (sums ``A`` and ``B`` apart, for equal ranks, as PEFT does),
            ``"ties"`` (Yadav et al., 2023: the largest entries of each factor, the sign that outweighs, their mean) or
            ``"dare"`` (Yu et al., 2024: entries of the factors dropped at random, the others scaled up).
        rank: of the result, for ``"svd"``; by default the largest of the ranks.
        density: the part of the entries that TIES and DARE keep.
        seed: of DARE.

    Raises:
        LowRankError: for unknown names, a name taken, unequal ranks where they must be equal, DoRA.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = lr.add_lora_(lr.add_lora_(model, rank=2, name="a"), rank=2, name="b")
        >>> lr.combine_lora_(model, {"a": 0.5, "b": 0.5}, "both")[0].lora_weight.names
        ['a', 'b', 'both']
    """
    for each in weights:
        check_name(model, each)
    if how not in ("linear", "concatenation", "svd", "ties", "dare"):
        raise LowRankError(f"combine_lora_: got how={how!r}, expected linear, concatenation, svd, ties or dare.")
    if not 0 < density <= 1:
        raise LowRankError(f"combine_lora_: got density {density!r}, expected a number in (0, 1].")
    generator = torch.Generator().manual_seed(seed)
    made: list[tuple[Bank, Adapter]] = []
    for bank in banks(model):
        if name in bank.names:
            raise LowRankError(f"combine_lora_: there is an adapter {name!r} already; give another name.")
        parts = [(weight, adapter) for own, weight in weights.items() for adapter in bank.named(own)]
        if not parts:
            continue
        if any(adapter.magnitude is not None for _, adapter in parts):
            raise LowRankError("combine_lora_: DoRA's lengths do not add up; merge such adapters into the weight.")
        a, b = _combined(parts, bank.kind, how, rank, density, generator)
        made.append((bank, Adapter(a, b, scaling=1.0)))
    for bank, adapter in made:
        bank.add(name, adapter)
    return use_adapter(model, name)


def _combined(
    parts: list[tuple[float, Adapter]],
    kind: Kind,
    how: How,
    rank: int | None,
    density: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    groups = kind.groups if isinstance(kind, Kernel) else 1
    if how in ("concatenation", "svd"):
        a, b = _concatenated(parts, groups)
        return (a, b) if how == "concatenation" else _truncated(a, b, groups, rank or _largest(parts))
    factors = []
    for weight, adapter in parts:
        if adapter.a0 is not None:
            raise LowRankError(f"combine_lora_: {how!r} sums factors apart, which a frozen start forbids; use 'svd'.")
        size = weight * float(adapter.scaling)
        root = abs(size) ** 0.5
        factors.append((adapter.A * root, adapter.B * root * (1 if size >= 0 else -1)))
    if len({a.shape for a, _ in factors}) > 1:
        raise LowRankError(f"combine_lora_: {how!r} needs equal ranks; use 'svd' or 'concatenation'.")
    sides = [torch.stack(side) for side in zip(*factors, strict=True)]
    if how == "ties":
        joint = [_elected(_largest_entries(side, density)) for side in sides]
    elif how == "dare":
        joint = [_dropped(side, density, generator).sum(0) for side in sides]
    else:
        joint = [side.sum(0) for side in sides]
    return joint[0], joint[1]


def _concatenated(parts: list[tuple[float, Adapter]], groups: int) -> tuple[Tensor, Tensor]:
    below, beside = [], []
    for weight, adapter in parts:
        size = weight * float(adapter.scaling)
        pairs: list[tuple[Tensor, Tensor]] = [(adapter.A, adapter.B * size)]
        if adapter.a0 is not None and adapter.b0 is not None:
            pairs.append((adapter.a0, adapter.b0 * -size))
        for a, b in pairs:
            below.append(a.unflatten(0, (groups, -1)))
            beside.append(b)
    return torch.cat(below, 1).flatten(0, 1), torch.cat(beside, 1)


def _truncated(a: Tensor, b: Tensor, groups: int, rank: int) -> tuple[Tensor, Tensor]:
    """``B A = Q_b (R_b R_a^T) Q_a^T``: only the small core is decomposed."""
    rows = a.unflatten(0, (groups, -1))
    columns = b.unflatten(0, (groups, -1)).movedim(2, -1)
    right, left = torch.linalg.qr(rows.flatten(2).double().mT), torch.linalg.qr(columns.flatten(1, -2).double())
    u, s, vh = exact_svd(left.R @ right.R.mT)
    root = s[:, None, :rank].sqrt()
    new_b = (left.Q @ u[..., :rank] * root).unflatten(1, columns.shape[1:-1]).movedim(-1, 2).flatten(0, 1)
    new_a = (right.Q @ vh.mT[..., :rank] * root).mT.unflatten(2, rows.shape[2:]).flatten(0, 1)
    return new_a.to(a).contiguous(), new_b.to(b).contiguous()


def _largest(parts: list[tuple[float, Adapter]]) -> int:
    return max(adapter.B.shape[1] for _, adapter in parts)


def _largest_entries(stack: Tensor, density: float) -> Tensor:
    flat = stack.flatten(1)
    kept = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().topk(kept, dim=1).values[:, -1:]
    return torch.where(flat.abs() >= threshold, flat, 0).view_as(stack)


def _elected(stack: Tensor) -> Tensor:
    """The mean of the entries that have the sign that outweighs."""
    agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return torch.where(agree, stack, 0).sum(0) / agree.sum(0).clamp_min(1)


def _dropped(stack: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(stack.shape, generator=generator).to(stack.device) < density
    return torch.where(kept, stack, 0) / density
