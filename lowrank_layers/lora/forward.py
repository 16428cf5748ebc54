"""Fast forwards of adapted layers: they add ``B A x`` to the output and never form the delta of the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LowRankError
from ..layers import (
    Int8Embedding,
    Int8Linear,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    LowRankLinear,
    PivotLinear,
)
from ..layers.conv1d import is_conv1d_class
from ..layers.conv_base import FactoredConv, TransposedConv
from ..layers.patches import pad_input
from .adapter import Bank
from .dropout import dropped_linear
from .weight_layout import Kernel, Matrix, parameter_of

Fast = Callable[..., Tensor]
"""``(class, module, bank, input)``, and for those ``WITH_MORE`` what else their forward takes."""


def fast_call(module: nn.Module) -> Fast | None:
    """The fast forward that a call of this module takes, if there is one.

    None where a method of the class was replaced on the instance: what stands there calls what its author found, which
    reads the weight as a whole. accelerate's hooks keep the forward of the class and call it: they change nothing.
    """
    cls, own = type(module), vars(module)
    for name, value in own.items():
        kept = own.get("_old_forward", value) if name == "forward" else value
        if callable(getattr(cls, name, None)) and getattr(kept, "__func__", None) is not getattr(cls, name):
            return None
    return fast_forward(getattr(module, "_plain_class", cls))


def fast_forward(cls: type[nn.Module]) -> Fast | None:
    """The fast forward of a class, if there is one: only where its own forward is the known one."""
    linear = nn.Linear.forward, LowRankLinear.forward, PivotLinear.forward, Int8Linear.forward
    if cls.forward in linear or _has_forward_of_conv1d(cls):
        return _linear
    if cls.forward in (nn.Embedding.forward, LowRankEmbedding.forward, Int8Embedding.forward):
        return _embedding
    if cls.forward is nn.EmbeddingBag.forward or cls.forward is LowRankEmbeddingBag.forward:
        return _bag
    if _is_convolution(cls):
        return _convolution
    if issubclass(cls, TransposedConv):
        return _transposed
    return _convolution if issubclass(cls, FactoredConv) else None


def add_biases(self: Any, bank: Bank, out: Tensor) -> Tensor:
    """The output with the biases of the adapters added, per row of the batch where rows differ."""
    if all(adapter.bias is None for adapter in bank):
        return out
    gates = bank.gates if bank.rows is None else bank.rows.mT
    inner = len(self.kernel_size) if isinstance(bank.layout, Kernel) else 0
    for gate, adapter in zip(gates, bank, strict=True):
        if adapter.bias is not None:
            bias = adapter.bias.view(-1, *[1] * inner)
            out = out + (gate.view(*gate.shape, *[1] * (out.ndim - gate.ndim)) * bias).to(out.dtype)
    return out


def _is_convolution(cls: type[nn.Module]) -> bool:
    """Whether a class convolves with its plain weight as torch's does, without standardizing or masking it."""
    return any(
        cls.forward is conv.forward and cls._conv_forward is conv._conv_forward  # type: ignore[attr-defined]
        for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


def _has_forward_of_conv1d(cls: type[nn.Module]) -> bool:
    return is_conv1d_class(next((kind for kind in cls.__mro__ if "forward" in vars(kind)), cls))


def _linear(cls: type[nn.Module], self: Any, bank: Bank, input: Tensor) -> Tensor:
    """``y = W x + b``, then ``y += B s (A x)`` in place: the delta costs no tensor of the output's size."""
    _check_rows(bank, self, input.shape[0] if input.ndim > 1 else None)
    x = input if input.ndim == 2 else input.reshape(-1, input.shape[-1])
    plain = parameter_of(self, "weight")
    if plain is None:
        out: Tensor = cls.forward(self, x)
    elif isinstance(bank.layout, Matrix) and bank.layout.transposed:  # transformers' Conv1D
        out = torch.addmm(self.bias, x, plain)
    else:
        out = F.linear(x, plain, self.bias)
    if bank.rows is not None and input.ndim > 2 and _alike(bank):
        _add_rows(bank, bank.rows, out, _dropped(bank, x))
    else:
        a, b = _stacked(bank)
        p = _dropout_probability(bank)
        inner = dropped_linear(x, a.to(x.dtype), p) if p else F.linear(x, a.to(x.dtype))
        strength = _strengths(bank)
        if bank.rows is not None:
            strength = strength.repeat_interleave(len(x) // len(strength), 0)
        out.addmm_((inner * strength).to(out.dtype), b.mT.to(out.dtype))
    return out if input.ndim == 2 else out.view(*input.shape[:-1], out.shape[-1])


def _alike(bank: Bank) -> bool:
    """Whether the adapters can be stacked: one rank, no frozen start."""
    return len({adapter.A.shape for adapter in bank}) == 1 and all(adapter.a0 is None for adapter in bank)


def _add_rows(bank: Bank, rows: Tensor, out: Tensor, x: Tensor) -> None:
    """Adds the deltas where each row has at most one adapter: its factors are gathered, in place of using all."""
    gate, index = rows.max(1)
    a = torch.stack([adapter.A.to(x.dtype) for adapter in bank])[index]
    b = torch.stack([adapter.B.to(out.dtype) for adapter in bank])[index]
    inner = torch.bmm(x.unflatten(0, (len(rows), -1)), a.mT)
    strength = gate * torch.stack([adapter.scaling for adapter in bank])[index]
    weighted = (inner * strength[:, None, None]).to(out.dtype)
    out.unflatten(0, (len(rows), -1)).baddbmm_(weighted, b.mT)


def _embedding(cls: type[nn.Module], self: Any, bank: Bank, input: Tensor) -> Tensor:
    """The base's rows, plus rows of ``A^T`` that are looked up likewise and multiplied by ``B``."""
    _check_rows(bank, self, input.shape[0] if input.ndim else None)
    plain = parameter_of(self, "weight")
    if plain is None:
        out: Tensor = cls.forward(self, input)
    else:
        out = F.embedding(
            input, plain, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
    a, b = _stacked(bank)
    inner = F.embedding(input, a.mT, self.padding_idx)
    strength = _strengths(bank)
    if bank.rows is not None:
        strength = strength.view(len(strength), *[1] * (inner.ndim - 2), -1)
    return out + (inner * strength).to(out.dtype) @ b.mT.to(out.dtype)


def _convolution(cls: type[nn.Module], self: Any, bank: Bank, input: Tensor) -> Tensor:
    """The base's convolution, plus one to ``r`` channels with the same settings and a pointwise one."""
    _check_rows(bank, self, input.shape[0] if input.ndim == len(self.kernel_size) + 2 else None)
    plain = parameter_of(self, "weight")
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
    out: Tensor = cls.forward(self, input) if plain is None else self._conv_forward(input, plain, self.bias)
    a, b = _stacked(bank)
    x = pad_input(self, _dropped(bank, input))
    inner = conv(x, a.to(x.dtype), None, self.stride, 0, self.dilation, self.groups)
    return out + conv(_weighted(self, bank, inner), b.to(inner.dtype), groups=self.groups)


def _transposed(
    cls: type[nn.Module], self: Any, bank: Bank, input: Tensor, output_size: Sequence[int] | None = None
) -> Tensor:
    """The base's transposed convolution, plus a pointwise one to ``r`` channels and a transposed one to its size."""
    dims = len(self.kernel_size)
    _check_rows(bank, self, input.shape[0] if input.ndim == dims + 2 else None)
    out: Tensor = cls.forward(self, input, output_size)
    a, b = _stacked(bank)
    x = _dropped(bank, input)
    inner = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, a.to(x.dtype), groups=self.groups)
    settings = zip(
        out.shape[-dims:], inner.shape[-dims:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
    )
    more = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in settings]
    kernel = b.to(inner.dtype).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
    conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    inner = _weighted(self, bank, inner)
    return out + conv(inner, kernel, None, self.stride, self.padding, more, self.groups, self.dilation)


def _bag(
    cls: type[nn.Module],
    self: Any,
    bank: Bank,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """The base's bags, plus bags of rows of ``A^T`` times ``B``: sums and means commute with a projection."""
    plain = parameter_of(self, "weight")
    bag = self.down if plain is None else self
    more: dict[str, Any] = {"include_last_offset": bag.include_last_offset, "padding_idx": bag.padding_idx}
    if plain is None:
        out: Tensor = cls.forward(self, input, offsets, per_sample_weights)
    else:
        norm = self.max_norm, self.norm_type, self.scale_grad_by_freq
        out = F.embedding_bag(input, plain, offsets, *norm, self.mode, self.sparse, per_sample_weights, **more)
    _check_rows(bank, self, len(out))
    a, b = _stacked(bank)
    weights = None if per_sample_weights is None else per_sample_weights.to(a.dtype)
    inner = F.embedding_bag(input, a.mT, offsets, mode=bag.mode, per_sample_weights=weights, **more)
    return out + (inner * _strengths(bank)).to(out.dtype) @ b.mT.to(out.dtype)


WITH_MORE = (_transposed, _bag)


def _weighted(self: Any, bank: Bank, inner: Tensor) -> Tensor:
    """The inner channels, each multiplied by its gate and scaling."""
    strength = _strengths(bank)
    if bank.rows is not None:
        strength = strength.view(len(strength), -1)
    if strength.numel() > 1:
        channels = strength.repeat(*[1] * (strength.ndim - 1), self.groups)
        strength = channels.view(*channels.shape, *[1] * len(self.kernel_size))
    return (inner * strength).to(inner.dtype)


def _stacked(bank: Bank) -> tuple[Tensor, Tensor]:
    """All ``A`` stacked vertically and all ``B`` horizontally; a frozen start gives ``[A; A0]`` and ``[B, -B0]``."""
    below: list[Tensor] = []
    beside: list[Tensor] = []
    for adapter in bank:
        below.append(adapter.A)
        beside.append(adapter.B)
        if adapter.a0 is not None and adapter.b0 is not None:
            below.append(adapter.a0)
            beside.append(-adapter.b0)
    if len(below) == 1:
        return below[0], beside[0]
    groups = bank.layout.groups if isinstance(bank.layout, Kernel) else 1
    joint = torch.cat([a.unflatten(0, (groups, -1)) for a in below], 1).flatten(0, 1)
    return joint, torch.cat(beside, 1)


def _strengths(bank: Bank) -> Tensor:
    """Gate times scaling of each inner channel, ``[sum of ranks]`` (with gates per row, ``[N, sum of ranks]``).

    One number, ``[1]``, where there is one adapter. The dtype is that of the adapters: in half precision a scaling of
    4 / 3 would be wrong by the same factor for all entries.
    """
    if bank.rows is None and len(bank.adapters) == 1:
        (only,) = bank
        return (only.gate * only.scaling).view(1)
    gates = bank.gates if bank.rows is None else bank.rows
    counts = gates * torch.stack([adapter.scaling for adapter in bank])
    ranks = [adapter.B.shape[1] * (1 if adapter.a0 is None else 2) for adapter in bank]
    if len(set(ranks)) == 1:
        return counts.repeat_interleave(ranks[0], -1)
    return torch.cat([counts[..., k, None].expand(*counts.shape[:-1], rank) for k, rank in enumerate(ranks)], -1)


def _dropped(bank: Bank, x: Tensor) -> Tensor:
    p = _dropout_probability(bank)
    return F.dropout(x, p) if p else x


def _dropout_probability(bank: Bank) -> float:
    """The largest dropout of the adapters, since all of them read one input; zero in eval mode."""
    return max(adapter.dropout for adapter in bank) if bank.training else 0.0


def _check_rows(bank: Bank, module: nn.Module, found: int | None) -> None:
    """Raises unless ``lora_rows`` was given as many names as the batch has samples."""
    if bank.rows is not None and len(bank.rows) != found:
        kind = getattr(module, "_plain_class", type(module)).__name__
        what = "an input without a batch dimension" if found is None else f"{found} samples in a batch"
        raise LowRankError(
            f"lora_rows: got {len(bank.rows)} names, but a layer ({kind}) got {what}; give one name per sample of the"
            " first dimension, and adapt only layers whose inputs have the batch there."
        )
