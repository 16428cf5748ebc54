"""How important each direction of an adapter is, and taking off those that are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modules import Succession
from .adapted_weight import AdaptedWeight
from .attach import detach_
from .cutting import removed, thinned_


class TrackedAdapter:
    """One adapter with the running averages of its entries, and which of its directions are kept.

    Args:
        weight: the weight that has the adapter.
        name: name of the adapter.
    """

    def __init__(self, weight: AdaptedWeight, name: str) -> None:
        adapter = weight.adapter(name)
        assert adapter is not None
        self.weight, self.name, self.adapter, self.layout = weight, name, adapter, weight.bank.layout
        self.kept = torch.ones(len(self._directions(adapter.A, adapter.B)[1]), dtype=torch.bool)
        self.averages = {
            f"{part}.{what}": torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            for part, weight in (("A", adapter.A), ("B", adapter.B))
            for what in ("sensitivity", "uncertainty")
        }

    @torch.no_grad()
    def observe(self, finite: Tensor, beta1: float, beta2: float) -> None:
        """Updates the averages from the gradients, in fp32: equations 8 to 10 of Zhang et al. (2023).

        Args:
            finite: a flag on the device; where it is false the averages stay, as they do without a gradient.
            beta1: smoothing of the sensitivity.
            beta2: smoothing of the uncertainty.
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
        """The importance of each direction, on the CPU: its mean over the entries in ``A`` plus that over ``B``."""
        entries = [self.averages[f"{part}.sensitivity"] * self.averages[f"{part}.uncertainty"] for part in "AB"]
        a, b = self._directions(entries[0], entries[1])
        return (a.flatten(1).mean(1) + b.flatten(1).mean(1)).cpu()

    @torch.no_grad()
    def mask_(self) -> None:
        """Sets the directions that are not kept to add nothing: ``B`` to zero, or both factors to their start."""
        a, b = self._directions(self.adapter.A, self.adapter.B)
        kept = self.kept.to(b.device)
        if self.adapter.a0 is not None and self.adapter.b0 is not None:
            a0, b0 = self._directions(self.adapter.a0, self.adapter.b0)
            a.copy_(torch.where(_beside(kept, a), a, a0))
            b.copy_(torch.where(_beside(kept, b), b, b0))
        else:
            b.masked_fill_(~_beside(kept, b), 0)

    def cut_(self) -> list[Succession]:
        """Cuts the dropped directions out of the adapter, or takes it off the weight if nothing of it is left.

        Where the adapter learns more than the product (DoRA's magnitude, a bias), one direction of zeros is kept.

        Returns:
            The parameters that are replaced.
        """
        self.mask_()
        index = self.kept.nonzero().flatten()
        if len(index) == len(self.kept):
            return []
        if len(index) == 0 and self.adapter.magnitude is None and self.adapter.bias is None:
            self.weight.bank.drop(self.name)
            if not self.weight.bank.names:
                detach_(self.weight)
            return removed(self.adapter)
        return thinned_(self.adapter, self.layout, index if len(index) else torch.zeros(1, dtype=torch.long))

    def _directions(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.layout.directions(a, b)


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    """The flags with trailing dimensions of one, so that they go with the first dimension of the values."""
    return flags.view(-1, *[1] * (values.ndim - 1))
