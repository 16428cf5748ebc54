"""Sums of changes that were trained apart: entries are pruned, and where signs disagree one of them wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combined(tensors: Sequence[Tensor], weights: Sequence[float], how: str, density: float, seed: Seed) -> Tensor:
    """One tensor from several of one shape, as PEFT's ``merge_utils`` computes it.

    Args:
        tensors: the changes.
        weights: what each is multiplied by, of either sign.
        how: ``"linear"``, ``"ties"``, ``"magnitude_prune"``, ``"dare_linear"`` or ``"dare_ties"``.
        density: the part of the entries that is kept, in (0, 1].
        seed: of what DARE drops.
    """
    if density < 1 and how.startswith("dare"):
        tensors = [_dropped(tensor, density, seed) for tensor in tensors]
    elif density < 1 and how != "linear":
        tensors = [_largest_entries(tensor, density) for tensor in tensors]
    stack = torch.stack(list(tensors))
    factors = torch.tensor(list(weights), dtype=stack.dtype, device=stack.device)
    weighted = stack * factors.view(-1, *[1] * (stack.ndim - 1))
    if not how.endswith("ties"):
        return weighted.sum(0)
    # the sign is elected before the weights: a negative weight takes the change off, it does not vote against it
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


class Seed:
    """A generator for each device, all of one seed: the draws of a model on one device are one sequence."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def _largest_entries(tensor: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, the others zero (TIES; Yadav et al., 2023)."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * len(flat))).indices
    mask = torch.zeros_like(flat).index_fill_(0, kept, 1)
    return (flat * mask).view_as(tensor)


def _dropped(tensor: Tensor, density: float, seed: Seed) -> Tensor:
    """Entries dropped at random, the others scaled up, so that the mean stays (DARE; Yu et al., 2024)."""
    kept = torch.bernoulli(torch.full_like(tensor, density), generator=seed.on(tensor.device))
    return tensor * kept / density
