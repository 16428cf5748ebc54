"""Which rows of a layer's input are data, given which positions of a batch are.

A mask is a boolean tensor ``[B, T]``, true where a position is data. It applies to a tensor whose leading sizes (all
but the features, for a linear layer) show batch and positions together:

- ``[B, T]``, ``[B, T, ...]`` and ``[B, H, T]``, with the batch or, as recurrent networks have it, time first;
- ``[B * T]`` and ``[B * H, T]``, as attention by heads flattens them;
- ``[1, T]``, ``[T]`` and ``[T, T]``, one row for all samples (position embeddings and biases): a position counts if any
  sample has it;
- ``[B]``, one row per sample (pooled): it counts if the sample has any position.

A convolution over ``[B, C, T]`` keeps the windows that it would also see without the padding: those that lie within the
sample's first and last data position, widened by the convolution's own padding. Tensors of other shapes have no
positions of this mask, and are counted whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import ConvNd, is_embedding
from ..layers.cost import conv_output_size, transposed_output_size
from ..layers.patches import input_rows, paddings

IGNORED = -100
"""The label that torch's cross-entropy ignores by default."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The rows of one call of a layer that are data.

    Args:
        inputs: boolean, of the shape of the input's rows (a convolution's windows ``[N, *positions]``).
        outputs: the same for the rows of the output; differs for embedding bags only.
        sample: input shape of the longest sample, without the batch and without padding.
        longest: its rows.
        silent: a convolution's input positions that are padding; it sees zeros there.
    """

    inputs: Tensor
    outputs: Tensor
    sample: tuple[int, ...]
    longest: int
    silent: Tensor | None = None


def read_mask(name: str, value: object) -> Tensor | None:
    """A mask ``[B, T]``, true where a position is data, from an argument; ``None`` if it is no such mask.

    By their names: ``*key_padding_mask`` are true, or minus infinity, at padding, as in torch; ``attention_mask`` is
    nonzero at data, as in transformers, or is added to scores, negative at padding.
    """
    if not isinstance(value, Tensor) or value.ndim != 2:
        return None
    value = value.detach()
    if name.endswith("key_padding_mask"):
        return value >= 0 if value.is_floating_point() else value == 0
    if value.is_floating_point():
        multiplied = bool(((value >= 0) & (value <= 1)).all() & (value > 0).any())
        return value != 0 if multiplied else value >= 0
    return value != 0


def labelled(labels: object) -> Tensor | None:
    """Positions up to each sample's last label, for integer labels ``[B, T]`` some of which are -100."""
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    valid = labels != IGNORED
    if bool(valid.all()):
        return None
    return valid.flip(1).cumsum(1).flip(1) > 0


def spread(real: Tensor, lead: tuple[int, ...], *, time_first: bool = False) -> tuple[Tensor, int | None] | None:
    """The mask in the layout of the leading sizes, and which of them runs over positions; ``None`` if they do not fit.

    Args:
        real: the mask, ``[B, T]`` (or ``[B, H, W]``).
        lead: the leading sizes of a tensor.
        time_first: how to read ``[n, n]``.
    """
    n, lead = real.ndim, tuple(lead)
    if n > 2:
        if lead[:n] == tuple(real.shape):
            return _widen(real, lead), None
    else:
        batch, length = real.shape
        orders = [(real.mT, 0), (real, 1)] if time_first else [(real, 1), (real.mT, 0)]
        for order, axis in orders:
            if lead[:2] == tuple(order.shape):
                return _widen(order, lead), axis
        if len(lead) == 3 and (lead[0], lead[2]) == (batch, length):
            return real[:, None].expand(lead), 2
        if lead == (1, length) or (lead == (length,) and length != batch):
            return real.any(0).view(lead), len(lead) - 1
        if lead[-2:] == (length, length) and lead[:-2] in ((), (1,)):
            every = real.any(0)
            return (every[:, None] & every).view(lead), len(lead) - 1
        if len(lead) == 2 and lead[1] == length and lead[0] % batch == 0:
            return real.repeat_interleave(lead[0] // batch, 0), 1
        if lead == (batch * length,):
            return orders[0][0].reshape(-1), None
    if lead == (real.shape[0],):
        return real.flatten(1).any(1), None
    return None


def over(real: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The mask, to be broadcast over a tensor ``[B, T, C]`` or ``[B, C, T]``; ``None`` if it does not fit."""
    channels_first = shape[:1] == (len(real),) and tuple(shape[2:]) == tuple(real.shape[1:])
    if channels_first and shape[:-1] != tuple(real.shape):
        return real[:, None]
    found = spread(real, shape[:-1])
    return None if found is None else found[0][..., None]


def kept(real: Tensor, module: nn.Module, x: Tensor, *, time_first: bool = False, full: bool = False) -> Kept | None:
    """The rows of a layer's batched input that are data; ``None`` where the mask has nothing to do with the input.

    Of a ``full`` mask, all of whose positions are data, only that is of interest: nothing is counted then.
    """
    if isinstance(module, ConvNd):
        return _kept_windows(real, module, x)
    lead = tuple(x.shape) if is_embedding(module) else tuple(x.shape[:-1])
    found = spread(real, lead, time_first=time_first)
    if found is None:
        return None
    inputs, axis = found
    if full:
        return Kept(inputs, inputs, tuple(x.shape[1:]), 0)
    shape = list(x.shape)
    if axis is not None:
        shape[axis] = int(inputs.movedim(axis, 0).flatten(1).sum(0).max())
    longest = int(inputs.flatten(1).sum(1).max()) if len(lead) > 1 else 1
    outputs = inputs.any(1) if isinstance(module, nn.EmbeddingBag) else inputs
    return Kept(inputs, outputs, tuple(shape[1:]), longest)


def fits(real: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape may run over the mask's positions."""
    if real.ndim > 2:
        return tuple(shape[1 : real.ndim]) == real.shape[1:] or tuple(shape[2 : real.ndim + 1]) == real.shape[1:]
    batch, length = real.shape
    return length in shape[:2] or shape[:1] == (batch * length,) or (len(shape) == 3 and shape[2] == length)


def data_rows(module: nn.Module, x: Tensor, rows: Kept | None) -> Iterator[Tensor]:
    """The rows of :func:`input_rows` that are data; a convolution sees zeros beyond them."""
    if rows is None:
        return input_rows(module, x)
    return input_rows(module, x if rows.silent is None else x.masked_fill(rows.silent, 0), rows.inputs)


def output_mask(real: Tensor, module: ConvNd, x: Tensor, windows: Tensor) -> Tensor:
    """The mask of what a convolution puts out."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return windows
    sizes = transposed_output_size(module, tuple(x.shape[2:]))
    result = real.new_ones(len(x), *sizes)
    for axis, size in enumerate(sizes):
        first, last = _span(real, axis)
        start = first * module.stride[axis]
        lost = x.shape[2 + axis] - (last - first + 1)
        places = torch.arange(size, device=real.device)
        inside = (places >= start[:, None]) & (places < (start + size - lost * module.stride[axis])[:, None])
        result = result & _along(inside, axis, len(sizes))
    return result & _some(real, len(sizes))


def _kept_windows(real: Tensor, conv: ConvNd, x: Tensor) -> Kept | None:
    """Windows between each sample's first and last data position, widened by the convolution's own padding."""
    dims = len(conv.kernel_size)
    if x.ndim != dims + 2 or tuple(real.shape) != (len(x), *x.shape[2:]):
        return None
    windows = real
    if not conv.transposed:
        sizes = conv_output_size(conv, tuple(x.shape[2:]))
        windows = real.new_ones(len(x), *sizes)
        for axis, (size, (left, right)) in enumerate(zip(sizes, paddings(conv), strict=True)):
            first, last = _span(real, axis)
            start = torch.arange(size, device=real.device) * conv.stride[axis]
            end = start + conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            inside = (start >= first[:, None]) & (end <= (last + left + right)[:, None])
            windows = windows & _along(inside, axis, dims)
        windows = windows & _some(real, dims)
    spans = [_span(real, axis) for axis in range(dims)]
    sample = (x.shape[1], *(int((last - first).max()) + 1 for first, last in spans))
    return Kept(windows, windows, sample, int(windows.flatten(1).sum(1).max()), ~real[:, None])


def _span(real: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """First and last data position of each sample along one axis, ``[N]`` each."""
    line = real.movedim(1 + axis, 1).flatten(2).any(2) if real.ndim > 2 else real
    ones = line.to(torch.uint8)
    return ones.argmax(1), line.shape[1] - 1 - ones.flip(1).argmax(1)


def _some(real: Tensor, dims: int) -> Tensor:
    return real.flatten(1).any(1).view(-1, *(1,) * dims)


def _along(inside: Tensor, axis: int, dims: int) -> Tensor:
    return inside.view(len(inside), *(inside.shape[1] if each == axis else 1 for each in range(dims)))


def _widen(real: Tensor, lead: tuple[int, ...]) -> Tensor:
    return real.reshape(*real.shape, *(1,) * (len(lead) - real.ndim)).expand(lead)
