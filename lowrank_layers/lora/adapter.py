"""An adapter, which is a low-rank delta of one weight, and the bank of all adapters of a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .learning import let_learn_
from .weight_layout import Matrix, WeightLayout


def adapter_dtype(weight: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype for adapters of a weight: fp32, or the weight's where that is wider, unless another is asked for.

    In half precision most steps of an optimizer are smaller than half a unit in the last place, and would be lost.
    """
    if dtype is not None:
        return dtype
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def check_dtype(dtype: object, who: str) -> None:
    """Raises if ``dtype`` is neither a floating point dtype nor ``None``."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LowRankError(f"{who}: got dtype {dtype!r}, expected a floating point dtype such as torch.float32.")


class Adapter(nn.Module):
    """``scaling (B A - B0 A0)`` for one weight; with a magnitude, the weight's outputs are renormalized (DoRA).

    Args:
        a: ``A``.
        b: ``B``.
        scaling: what the product is multiplied by.
        dropout: probability of dropout on the input of ``A``, in training.
        start: the frozen ``(A0, B0)``, where the initial product is not zero: it is subtracted again, so that the base
            stays unchanged.
        magnitude: trained lengths of the weight's outputs.
        bias: trained vector that is added to the output.

    All that decides an output is in the state dict: ``scaling`` and ``gate``, which is 1 while the adapter is in use
    and 0 while it is not, are buffers.
    """

    scaling: Tensor
    gate: Tensor
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
        wide = torch.promote_types(a.dtype, torch.float32)
        self.register_buffer("scaling", torch.tensor(scaling, dtype=wide, device=a.device))
        self.register_buffer("gate", torch.ones((), dtype=wide, device=a.device))
        self.register_buffer("a0", None if start is None else start[0])
        self.register_buffer("b0", None if start is None else start[1])
        self.withheld: Tensor | None = None  # the gate that comes back after lora_disabled

    def use_(self, on: bool) -> None:
        """Turns the adapter on or off. While it is off it does not learn: its gradients are ``None``."""
        gate = self.gate if self.withheld is None else self.withheld
        gate.detach().fill_(float(on))
        let_learn_(self, on)

    def withhold_(self) -> None:
        """Turns the adapter off until :meth:`restore_`."""
        self.withheld = self.gate.clone()
        self.gate.detach().zero_()

    def restore_(self) -> None:
        """Ends :meth:`withhold_`."""
        if self.withheld is not None:
            self.gate.detach().copy_(self.withheld)
        self.withheld = None

    @property
    def in_use(self) -> bool:
        """Whether the adapter is on, or will be once ``lora_disabled`` ends."""
        return bool(self.gate if self.withheld is None else self.withheld)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        kept = {name: getattr(self, name) for name in ("scaling", "gate")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():  # a scaling of 4 / 3 that was rounded once would stay wrong for good
            now = getattr(self, name)
            if torch.promote_types(now.dtype, before.dtype) != now.dtype and not before.is_meta:
                setattr(self, name, before.to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a state dict of the base: the adapter stays as it is
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.gate.is_meta:
            let_learn_(self, bool(self.gate))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "withheld": None}

    def delta(self, layout: WeightLayout, dtype: torch.dtype | None = None) -> Tensor:
        """``scaling (B A - B0 A0)`` in the layout of the weight, computed in that dtype."""
        dtype = self.A.dtype if dtype is None else dtype
        product = layout.product(self.A.to(dtype), self.B.to(dtype))
        if self.a0 is not None and self.b0 is not None:
            product = product - layout.product(self.a0.to(dtype), self.b0.to(dtype))
        return product * self.scaling.to(product.dtype)

    @torch.no_grad()
    def resize_(self, layout: WeightLayout, weight: Tensor) -> None:
        """Fits the adapter to a weight with more or fewer rows: rows that stay keep their delta, new ones have none."""
        shapes = layout.shapes(weight, self.A.shape[-2])
        self.A.data, self.B.data = _cut_or_filled(self.A, shapes[0]), _cut_or_filled(self.B, shapes[1])
        if self.a0 is not None and self.b0 is not None:
            self.a0, self.b0 = _cut_or_filled(self.a0, shapes[0]), _cut_or_filled(self.b0, shapes[1])
        if self.magnitude is not None:
            lengths = layout.lengths(weight.detach().float()).to(self.magnitude)
            old = min(len(lengths), len(self.magnitude))
            self.magnitude.data = torch.cat([self.magnitude[:old], lengths[old:]])
        if self.bias is not None:
            self.bias.data = _cut_or_filled(self.bias, (shapes[1][-2],))
        for parameter in self.parameters():
            parameter.grad = None

    def extra_repr(self) -> str:
        """The shapes and the scaling, as printed."""
        text = f"A={list(self.A.shape)}, B={list(self.B.shape)}, scaling={float(self.scaling):g}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


def _cut_or_filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor cut, or filled with zeros, at the end of each dimension."""
    result = tensor.new_zeros(shape)
    part = tuple(slice(min(old, new)) for old, new in zip(tensor.shape, shape, strict=True))
    result[part] = tensor[part].detach()
    return result


class Bank(nn.Module):
    """The adapters of one weight, by name.

    Their gates are values in tensors, so that switching frozen adapters, scaling and disabling recompile nothing.

    Args:
        layout: layout of the weight.
    """

    merged: Tensor | None

    def __init__(self, layout: WeightLayout) -> None:
        super().__init__()
        self.layout = layout
        self.adapters = nn.ModuleDict()
        self.rows: Tensor | None = None  # [N, adapters]: one gate per row of a batch
        # the base weight, while the adapters are part of it; a buffer, so that it follows the model's device and dtype
        self.register_buffer("merged", None, persistent=False)

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter, which is in use at once."""
        self.adapters[name] = adapter

    def drop(self, name: str) -> None:
        """Removes the adapter of that name."""
        del self.adapters[name]

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were added."""
        return list(self.adapters)

    @property
    def gates(self) -> Tensor:
        """What each adapter is multiplied by, 1 or 0, in the order of the names."""
        return torch.stack([adapter.gate for adapter in self])

    @property
    def disabled(self) -> bool:
        """Whether the model is inside ``lora_disabled``."""
        return any(adapter.withheld is not None for adapter in self)

    def check_resizable(self, owner: str) -> None:
        """Raises if the adapters cannot follow their weight to another number of rows."""
        if self.merged is not None:
            raise LowRankError(
                f"resize_token_embeddings: the adapters of a {owner} are merged; call unmerge_lora_ first. Nothing is"
                " changed."
            )
        if any(adapter.magnitude is not None for adapter in self) and self.layout == Matrix(transposed=True):
            raise LowRankError(
                f"resize_token_embeddings: a {owner} has adapters with magnitudes (DoRA), lengths over all rows, which"
                " every new one would change; resize the model before add_lora_. Nothing is changed."
            )

    def resize_(self, weight: Tensor) -> None:
        """Fits all adapters to a weight with more or fewer rows."""
        for adapter in self:
            adapter.resize_(self.layout, weight)

    def named(self, name: str) -> list[Adapter]:
        """The adapter of that name in a list, which is empty where there is none."""
        return [adapter for own, adapter in zip(self.names, self, strict=True) if own == name]

    def __iter__(self) -> Iterator[Adapter]:
        return iter(cast("dict[str, Adapter]", self.adapters._modules).values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.merged is not None:
            raise LowRankError(
                "state_dict: the adapters are merged, and a state dict would be loaded as if they were not. Call"
                " unmerge_lora_(model) before saving, or merge_lora_(model, unload=True) to save the plain model."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def effective(self, weight: Tensor) -> Tensor:
        """The weight with the deltas of all adapters in use, summed in the wider of the dtypes and rounded once."""
        if self.merged is not None:
            return weight
        if self.rows is not None:
            raise LowRankError(
                "lora_rows: this weight is read as a whole (attention, recurrent, transposed or DoRA) and serves all"
                " rows alike; adapt linear layers, convolutions and embeddings only."
            )
        result = weight
        # autograd keeps the gates: copies, so that switching before the backward pass does not change them
        for adapter in self:
            delta = adapter.delta(self.layout, torch.promote_types(adapter.A.dtype, weight.dtype))
            result = result + delta * adapter.gate.to(delta.dtype, copy=True)
        for adapter in self:
            if adapter.magnitude is not None:
                gate = adapter.gate.to(result.dtype, copy=True)
                result = result + gate * (self._renormalized(adapter, result) - result)
        return result.to(weight.dtype)

    def _renormalized(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """``m W / |W|`` with the length as a constant (DoRA; Liu et al., 2024, section 4.3)."""
        assert adapter.magnitude is not None
        lengths = self.layout.lengths(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
        return self.layout.scaled(weight, (adapter.magnitude / lengths).to(weight.dtype))
