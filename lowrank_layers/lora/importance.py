"""How much each direction of an adapter matters, and taking those off that matter least."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter, Bank


class Watched:
    """One adapter with the running averages of its entries and the directions that are kept.

    Args:
        bank: that has the adapter.
        name: of the adapter.
    """

    def __init__(self, bank: Bank, name: str) -> None:
        adapter = bank.adapters[name]
        assert isinstance(adapter, Adapter)
        self.bank, self.adapter = bank, adapter
        self.kept = torch.ones(len(self._directions(adapter.A, adapter.B)[1]), dtype=torch.bool)
        self.averages = {
            f"{part}.{what}": torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            for part, weight in (("A", adapter.A), ("B", adapter.B))
            for what in ("sensitivity", "uncertainty")
        }

    @torch.no_grad()
    def observe(self, finite: Tensor, beta1: float, beta2: float) -> None:
        """Equations 8 to 10 of Zhang et al. (2023), in fp32; without a gradient the averages stay.

        Args:
            finite: a flag on the device; where it is false, the averages stay as well.
            beta1: of the sensitivity.
            beta2: of the uncertainty.
        """
        for part, weight, start in (
            ("A", self.adapter.A, self.adapter.a0),
            ("B", self.adapter.B, self.adapter.b0),
        ):
            if weight.grad is None:
                continue
            old = [self.averages[f"{part}.{what}"].to(weight.device) for what in ("sensitivity", "uncertainty")]
            # w grad w estimates what is lost when w becomes zero; one with a start becomes its start instead
            change = weight.float() if start is None else weight.float() - start.float()
            now = (change * weight.grad.float()).abs()
            sensitivity = old[0].lerp(now, 1 - beta1)
            uncertainty = old[1].lerp((now - sensitivity).abs(), 1 - beta2)
            ok = finite.to(weight.device)
            self.averages[f"{part}.sensitivity"] = torch.where(ok, sensitivity, old[0])
            self.averages[f"{part}.uncertainty"] = torch.where(ok, uncertainty, old[1])

    def scores(self) -> Tensor:
        """Of every direction: the mean over its entries in ``A`` plus that over its entries in ``B``, on the CPU."""
        entries = [self.averages[f"{part}.sensitivity"] * self.averages[f"{part}.uncertainty"] for part in "AB"]
        a, b = self._directions(entries[0], entries[1])
        return (a.flatten(1).mean(1) + b.flatten(1).mean(1)).cpu()

    @torch.no_grad()
    def mask_(self) -> None:
        """Directions that are not kept add nothing: ``B`` is zero there, or both factors are those of the start."""
        a, b = self._directions(self.adapter.A, self.adapter.B)
        kept = self.kept.to(b.device)
        if self.adapter.a0 is not None and self.adapter.b0 is not None:
            a0, b0 = self._directions(self.adapter.a0, self.adapter.b0)
            a.copy_(torch.where(_beside(kept, a), a, a0))
            b.copy_(torch.where(_beside(kept, b), b, b0))
        else:
            b.masked_fill_(~_beside(kept, b), 0)

    def _directions(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.bank.kind.directions(a, b)


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (values.ndim - 1))
