"""From the positions of a batch that are data to the rows of a layer's input that are.

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


@dataclass(frozen=True, eq=False)
class DataRows:
    """The rows of one call of a layer that are data.

    Args:
        inputs: boolean mask of the input's rows (a convolution's windows ``[N, *positions]``).
        outputs: boolean mask of the output's rows; differs from that of the inputs for embedding bags only.
        sample: input shape of the longest sample, without the batch and without padding.
        longest: number of rows of the longest sample.
        silent: boolean mask of a convolution's input positions that are padding; it sees zeros there.
    """

    inputs: Tensor
    outputs: Tensor
    sample: tuple[int, ...]
    longest: int
    silent: Tensor | None = None


def mask_of_rows(mask: Tensor, lead: tuple[int, ...], *, time_first: bool = False) -> tuple[Tensor, int | None] | None:
    """Returns the mask in the layout of the leading sizes, and which of them runs over positions.

    Where the sizes show nothing of the mask, the result is ``None``.

    Args:
        mask: the mask, ``[B, T]`` (or ``[B, H, W]``).
        lead: the leading sizes of a tensor.
        time_first: whether ``[n, n]`` is read as ``[T, B]``.
    """
    n, lead = mask.ndim, tuple(lead)
    if n > 2:
        if lead[:n] == tuple(mask.shape):
            return _widen(mask, lead), None
    else:
        batch, length = mask.shape
        orders = [(mask.mT, 0), (mask, 1)] if time_first else [(mask, 1), (mask.mT, 0)]
        for order, axis in orders:
            if lead[:2] == tuple(order.shape):
                return _widen(order, lead), axis
        if len(lead) == 3 and (lead[0], lead[2]) == (batch, length):
            return mask[:, None].expand(lead), 2
        if lead == (1, length) or (lead == (length,) and length != batch):
            return mask.any(0).view(lead), len(lead) - 1
        if lead[-2:] == (length, length) and lead[:-2] in ((), (1,)):
            every = mask.any(0)
            return (every[:, None] & every).view(lead), len(lead) - 1
        if len(lead) == 2 and lead[1] == length and lead[0] % batch == 0:
            return mask.repeat_interleave(lead[0] // batch, 0), 1
        if lead == (batch * length,):
            return orders[0][0].reshape(-1), None
    if lead == (mask.shape[0],):
        return mask.flatten(1).any(1), None
    return None


def broadcastable(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Returns the mask to be broadcast over a tensor ``[B, T, C]`` or ``[B, C, T]``; ``None`` if it does not fit."""
    channels_first = shape[:1] == (len(mask),) and tuple(shape[2:]) == tuple(mask.shape[1:])
    if channels_first and shape[:-1] != tuple(mask.shape):
        return mask[:, None]
    found = mask_of_rows(mask, shape[:-1])
    return None if found is None else found[0][..., None]


def find_data_rows(
    mask: Tensor, module: nn.Module, x: Tensor, *, time_first: bool = False, full: bool = False
) -> DataRows | None:
    """Returns which rows of a layer's batched input are data; ``None`` where the mask has nothing to do with it.

    Args:
        mask: the mask of the batch.
        module: the layer.
        x: its input, with a batch dimension.
        time_first: whether ``[n, n]`` is read as ``[T, B]``.
        full: whether all positions of the mask are data; nothing is counted then.
    """
    if isinstance(module, ConvNd):
        return _data_windows(mask, module, x)
    lead = tuple(x.shape) if is_embedding(module) else tuple(x.shape[:-1])
    found = mask_of_rows(mask, lead, time_first=time_first)
    if found is None:
        return None
    inputs, axis = found
    if full:
        return DataRows(inputs, inputs, tuple(x.shape[1:]), 0)
    shape = list(x.shape)
    if axis is not None:
        shape[axis] = int(inputs.movedim(axis, 0).flatten(1).sum(0).max())
    longest = int(inputs.flatten(1).sum(1).max()) if len(lead) > 1 else 1
    outputs = inputs.any(1) if isinstance(module, nn.EmbeddingBag) else inputs
    return DataRows(inputs, outputs, tuple(shape[1:]), longest)


def may_run_over(mask: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape may run over the mask's positions."""
    if mask.ndim > 2:
        return tuple(shape[1 : mask.ndim]) == mask.shape[1:] or tuple(shape[2 : mask.ndim + 1]) == mask.shape[1:]
    batch, length = mask.shape
    return length in shape[:2] or shape[:1] == (batch * length,) or (len(shape) == 3 and shape[2] == length)


def masked_input_rows(module: nn.Module, x: Tensor, rows: DataRows | None) -> Iterator[Tensor]:
    """Returns the rows of :func:`input_rows` that are data; a convolution sees zeros beyond them."""
    if rows is None:
        return input_rows(module, x)
    return input_rows(module, x if rows.silent is None else x.masked_fill(rows.silent, 0), rows.inputs)


def output_mask(mask: Tensor, module: ConvNd, x: Tensor, windows: Tensor) -> Tensor:
    """Returns the mask of a convolution's output, given the windows of its input that are data."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return windows
    sizes = transposed_output_size(module, tuple(x.shape[2:]))
    result = mask.new_ones(len(x), *sizes)
    for axis, size in enumerate(sizes):
        first, last = _span(mask, axis)
        start = first * module.stride[axis]
        lost = x.shape[2 + axis] - (last - first + 1)
        places = torch.arange(size, device=mask.device)
        inside = (places >= start[:, None]) & (places < (start + size - lost * module.stride[axis])[:, None])
        result = result & _along(inside, axis, len(sizes))
    return result & _some(mask, len(sizes))


def _data_windows(mask: Tensor, conv: ConvNd, x: Tensor) -> DataRows | None:
    """Windows between each sample's first and last data position, widened by the convolution's own padding."""
    dims = len(conv.kernel_size)
    if x.ndim != dims + 2 or tuple(mask.shape) != (len(x), *x.shape[2:]):
        return None
    windows = mask
    if not conv.transposed:
        sizes = conv_output_size(conv, tuple(x.shape[2:]))
        windows = mask.new_ones(len(x), *sizes)
        for axis, (size, (left, right)) in enumerate(zip(sizes, paddings(conv), strict=True)):
            first, last = _span(mask, axis)
            start = torch.arange(size, device=mask.device) * conv.stride[axis]
            end = start + conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            inside = (start >= first[:, None]) & (end <= (last + left + right)[:, None])
            windows = windows & _along(inside, axis, dims)
        windows = windows & _some(mask, dims)
    spans = [_span(mask, axis) for axis in range(dims)]
    sample = (x.shape[1], *(int((last - first).max()) + 1 for first, last in spans))
    return DataRows(windows, windows, sample, int(windows.flatten(1).sum(1).max()), ~mask[:, None])


def _span(mask: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """First and last data position of each sample along one axis, ``[N]`` each."""
    line = mask.movedim(1 + axis, 1).flatten(2).any(2) if mask.ndim > 2 else mask
    ones = line.to(torch.uint8)
    return ones.argmax(1), line.shape[1] - 1 - ones.flip(1).argmax(1)


def _some(mask: Tensor, dims: int) -> Tensor:
    """The samples with any data, to be broadcast over so many dimensions."""
    return mask.flatten(1).any(1).view(-1, *(1,) * dims)


def _along(inside: Tensor, axis: int, dims: int) -> Tensor:
    """``[N, n]`` to be broadcast over so many dimensions, of which ``n`` is one."""
    return inside.view(len(inside), *(inside.shape[1] if each == axis else 1 for each in range(dims)))


def _widen(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * (len(lead) - mask.ndim)).expand(lead)
