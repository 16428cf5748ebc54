"""Sums of what was learned apart (task vectors): TIES, DARE and magnitude pruning, as PEFT computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrunedSum:
    """A weighted sum of tensors of one shape, whose entries are pruned first.

    Args:
        how: ``"linear"`` (nothing is pruned), ``"magnitude_prune"``, ``"ties"``, ``"dare_linear"`` or ``"dare_ties"``.
        density: fraction of the entries that is kept, in (0, 1].
        seed: seed of what DARE drops. The draws of all sums on one device are one sequence.
    """

    how: str
    density: float
    seed: int
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The sum of the tensors, each with a weight of either sign."""
        if self.density < 1 and self.how != "linear":
            prune = self._random_entries if self.how.startswith("dare") else self._largest_entries
            tensors = [prune(tensor) for tensor in tensors]
        stack = torch.stack(list(tensors))
        factors = torch.tensor(list(weights), dtype=stack.dtype, device=stack.device)
        weighted = stack * factors.view(-1, *[1] * (stack.ndim - 1))
        if not self.how.endswith("ties"):
            return weighted.sum(0)
        # the sign is elected before the weights: a negative weight takes the change off, it does not vote against it
        agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)

    def _largest_entries(self, tensor: Tensor) -> Tensor:
        """The entries of largest magnitude, the others zero (TIES; Yadav et al., 2023)."""
        flat = tensor.flatten()
        kept = flat.abs().topk(int(self.density * len(flat))).indices
        mask = torch.zeros_like(flat).index_fill_(0, kept, 1)
        return (flat * mask).view_as(tensor)

    def _random_entries(self, tensor: Tensor) -> Tensor:
        """Random entries, scaled up so that the mean stays, the others zero (DARE; Yu et al., 2024)."""
        device = tensor.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        kept = torch.bernoulli(torch.full_like(tensor, self.density), generator=self._generators[device])
        return tensor * kept / self.density
