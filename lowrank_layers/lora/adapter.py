"""One named delta of one weight, and the bank of all that a layer has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .kinds import Kind


class Adapter(nn.Module):
    """``scaling (B A - B0 A0)`` for one weight; with a magnitude, the weight's outputs are renormalised (DoRA).

    Args:
        a: ``A``.
        b: ``B``.
        scaling: what the product is multiplied by.
        dropout: on the input of ``A``, in training.
        start: ``(A0, B0)``, frozen, where the initial product is not zero: it is taken off again, so that the base need
            not be touched.
        magnitude: the lengths of the weight's outputs.
        bias: added to the output.
    """

    scaling: Tensor
    a0: Tensor | None
    b0: Tensor | None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        start: tuple[Tensor, Tensor] | None = None,
        magnitude: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.dropout = dropout
        self.register_buffer("scaling", torch.tensor(scaling, dtype=torch.float32, device=a.device), persistent=False)
        self.register_buffer("a0", None if start is None else start[0])
        self.register_buffer("b0", None if start is None else start[1])

    def delta(self, kind: Kind, dtype: torch.dtype | None = None) -> Tensor:
        """``scaling (B A - B0 A0)`` in the layout of the weight, computed in that dtype."""
        dtype = self.A.dtype if dtype is None else dtype
        product = kind.product(self.A.to(dtype), self.B.to(dtype))
        if self.a0 is not None and self.b0 is not None:
            product = product - kind.product(self.a0.to(dtype), self.b0.to(dtype))
        return product * self.scaling.to(product.dtype)

    def extra_repr(self) -> str:
        """The shapes, as printed."""
        text = f"A={list(self.A.shape)}, B={list(self.B.shape)}, scaling={float(self.scaling):g}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


class Bank(nn.Module):
    """The adapters of one weight, by name, and how much each one counts.

    The gates are values in a tensor: switching, scaling and disabling change no code, and so nothing is recompiled.

    Args:
        kind: the layout of the weight.
    """

    gates: Tensor

    def __init__(self, kind: Kind, device: torch.device) -> None:
        super().__init__()
        self.kind = kind
        self.adapters = nn.ModuleDict()
        self.register_buffer("gates", torch.zeros(0, device=device), persistent=False)
        self.rows: Tensor | None = None  # [N, adapters]: a gate for each row of a batch
        self.merged: Tensor | None = None  # the base weight, while the adapters are part of it

    def add(self, name: str, adapter: Adapter) -> None:
        """One more; it counts at once."""
        self.adapters[name] = adapter
        self.gates = torch.cat([self.gates, self.gates.new_ones(1)])

    def drop(self, name: str) -> None:
        """Removes one."""
        index = self.names.index(name)
        del self.adapters[name]
        self.gates = torch.cat([self.gates[:index], self.gates[index + 1 :]])

    @property
    def names(self) -> list[str]:
        """In the order of the gates."""
        return list(self.adapters)

    def named(self, name: str) -> list[Adapter]:
        """The adapter of that name, if there is one."""
        return [adapter for own, adapter in zip(self.names, self, strict=True) if own == name]

    def __iter__(self) -> Iterator[Adapter]:
        return iter(cast("dict[str, Adapter]", self.adapters._modules).values())

    def effective(self, weight: Tensor) -> Tensor:
        """The weight with every adapter in it."""
        if self.merged is not None:
            return weight
        if self.rows is not None:
            raise LowRankError(
                "lora_rows: this weight is read as a whole (attention, recurrent, transposed or DoRA) and serves all"
                " rows alike; adapt linear layers, convolutions and tables only."
            )
        result = weight
        for adapter, gate in zip(self, self.gates, strict=True):
            delta = adapter.delta(self.kind, torch.promote_types(adapter.A.dtype, weight.dtype))
            result = result + (delta * gate.to(delta.dtype)).to(weight.dtype)
        for adapter, gate in zip(self, self.gates, strict=True):
            if adapter.magnitude is not None:
                result = result + gate.to(result.dtype) * (self._renormalised(adapter, result) - result)
        return result

    def _renormalised(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """``m W / |W|``, the length taken as a constant (Liu et al., 2024, section 4.3)."""
        assert adapter.magnitude is not None
        lengths = self.kind.lengths(weight.detach().float())
        return self.kind.scaled(weight, (adapter.magnitude / lengths).to(weight.dtype))
