r"""Second moments of a convolution's patches, from products of shifted inputs.

Entries of a patch at offsets :math:`a` and :math:`b` are the input at two positions with the distance
:math:`d = b - a`. So the moment's block is the sum of :math:`x_q y_{q + d}^T` over the positions :math:`q = p + a` of
all windows :math:`p`: one sum per distance, and not per pair of offsets, but for few lines at the border. For a kernel
of 3 x 3 there are 25 distances and 81 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvNd
from ..layers.patches import paddings

_ENTRIES = 2**20
"""Entries of shifted inputs formed at once."""
Box = tuple[tuple[int, int], ...]
"""First position and end, per axis."""


def patch_sums(module: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, int] | None:
    """Returns the sum of a convolution's patches of ``x``, ``sum_p X_p Y_p^T``, and the number of patches.

    Args:
        module: the layer.
        x: batched input, ``[N, C, ...]``.
        y: another one of the same shape; ``None`` is ``x`` itself.

    Returns:
        Sums in fp64, of products in fp32 at least, as ``sums`` of :func:`input_rows` gives them; ``None`` for layers
        and inputs to which this does not apply, or where it would not be faster.
    """
    if not _applies(module, x) or (y is not None and not _applies(module, y)):
        return None
    assert isinstance(module, ConvNd)
    x = _wide(x)
    other = x if y is None else _wide(y)
    with torch.autocast(x.device.type, enabled=False):
        windows = _Windows(tuple(x.shape[2:]), module.kernel_size, [low for low, _ in paddings(module)], _ends(module))
        blocks = _blocks(x, other, windows, y is None)
        area, channels = math.prod(windows.kernel), x.shape[1]
        moment = torch.stack(blocks).view(area, area, channels, channels).permute(2, 0, 3, 1)
        summed = x.double().sum(0)
        total = torch.stack([_cut(summed, windows.seen(a)).flatten(1).sum(1) for a in windows.offsets], 1)
    return total.flatten(), moment.reshape(channels * area, -1), len(x) * math.prod(windows.out)


def _applies(module: nn.Module, x: Tensor) -> bool:
    """Whether it is a convolution of one group without strides, of which the input is large and of moderate size."""
    if not isinstance(module, ConvNd) or module.transposed or module.groups != 1 or module.padding_mode != "zeros":
        return False
    if {*module.stride, *module.dilation} != {1} or math.prod(module.kernel_size) == 1:
        return False
    sizes = x.shape[2:]
    if any(size < 2 * k for size, k in zip(sizes, module.kernel_size, strict=True)) or not len(x):
        return False
    low, high = (float(end) for end in x.aminmax())
    return 1e-9 < max(-low, high) < 1e9


def _ends(module: ConvNd) -> list[int]:
    return [high for _, high in paddings(module)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Windows:
    """The windows of a convolution over an input: which positions of it they see.

    Args:
        sizes: sizes of the input.
        kernel: sizes of the kernel.
        before: zeros before the input.
        after: zeros after it.
    """

    def __init__(
        self, sizes: Sequence[int], kernel: Sequence[int], before: Sequence[int], after: Sequence[int]
    ) -> None:
        self.sizes, self.kernel, self.before = sizes, kernel, before
        self.out = [s + b + e - k + 1 for s, k, b, e in zip(sizes, kernel, before, after, strict=True)]
        self.offsets = list(product(*(range(k) for k in kernel)))

    def seen(self, a: tuple[int, ...]) -> Box:
        """Which positions of the input stand at an offset of some window."""
        return self.pair(a, a)

    def pair(self, a: tuple[int, ...], b: tuple[int, ...]) -> Box:
        """Which positions stand at an offset of a window that has a position of the input at the other offset too."""
        box = []
        for i, (size, out, before) in enumerate(zip(self.sizes, self.out, self.before, strict=True)):
            first = max(0, before - a[i], before - b[i])
            end = min(out, size + before - a[i], size + before - b[i])
            box.append((first + a[i] - before, end + a[i] - before))
        return tuple(box)

    def whole(self, d: tuple[int, ...]) -> Box:
        """Which positions of the input have another one at this distance."""
        return tuple((max(0, -step), min(size, size - step)) for size, step in zip(self.sizes, d, strict=True))


def _blocks(x: Tensor, y: Tensor, windows: _Windows, symmetric: bool) -> list[Tensor]:
    """``sum_p x_(p + a) y_(p + b)^T`` for all pairs of offsets, ``[C, C]`` each."""
    steps = {tuple(j - i for i, j in zip(a, b, strict=True)) for a in windows.offsets for b in windows.offsets}
    distances = sorted(d for d in steps if not symmetric or d >= (0,) * len(d))
    sums = dict(zip(distances, _shifted(x, y, distances, windows), strict=True))
    parts: dict[tuple[tuple[int, ...], Box], Tensor] = {}

    def part(d: tuple[int, ...], box: Box) -> Tensor:
        if (d, box) not in parts:
            moved = tuple((first + step, end + step) for (first, end), step in zip(box, d, strict=True))
            parts[d, box] = (_columns(_cut(x, box)) @ _columns(_cut(y, moved)).mT).double()
        return parts[d, box]

    def block(a: tuple[int, ...], b: tuple[int, ...]) -> Tensor:
        d = tuple(j - i for i, j in zip(a, b, strict=True))
        if d not in sums:
            return block(b, a).mT
        found: Tensor = sums[d]
        for box, sign in _missing(windows.whole(d), windows.pair(a, b)):
            found = found + sign * part(d, box)
        return found

    return [block(a, b) for a in windows.offsets for b in windows.offsets]


def _missing(whole: Box, box: Box) -> Iterator[tuple[Box, int]]:
    """The parts of a box that lie outside of a smaller one, with the signs of inclusion and exclusion."""
    sides = [
        [(w, 1), *(((first, end), -1) for first, end in ((w[0], b[0]), (b[1], w[1])) if first < end)]
        for w, b in zip(whole, box, strict=True)
    ]
    for chosen in product(*sides):
        parts = tuple(part for part, _ in chosen)
        if parts != whole:
            yield parts, math.prod(sign for _, sign in chosen)


def _shifted(x: Tensor, y: Tensor, distances: Sequence[tuple[int, ...]], windows: _Windows) -> Tensor:
    """``sum_q x_q y_(q + d)^T`` over the whole input, for each distance, ``[D, C, C]`` in fp64."""
    samples, channels = x.shape[:2]
    pads = [n for k in reversed(windows.kernel) for n in (k - 1, k - 1)]
    step = max(1, _ENTRIES // (len(distances) * channels * math.prod(windows.sizes)))
    found = torch.zeros(channels, len(distances) * channels, dtype=torch.float64, device=x.device)
    for start in range(0, samples, step):
        own, padded = x[start : start + step], F.pad(y[start : start + step], pads).transpose(0, 1)
        moved = padded.new_empty(len(distances), channels, len(own), *windows.sizes)
        for place, d in enumerate(distances):
            box = tuple(
                (k - 1 + s, k - 1 + s + size) for k, s, size in zip(windows.kernel, d, windows.sizes, strict=True)
            )
            moved[place] = _cut(padded, box)
        found += _columns(own) @ moved.flatten(2).flatten(0, 1).mT
    return found.view(channels, len(distances), channels).transpose(0, 1)


def _cut(x: Tensor, box: Box) -> Tensor:
    """A box of the last axes."""
    for axis, (first, end) in enumerate(box, x.ndim - len(box)):
        x = x.narrow(axis, first, end - first)
    return x


def _columns(x: Tensor) -> Tensor:
    """``[N, C, ...]`` as ``[C, N * ...]``."""
    return x.transpose(0, 1).flatten(1)
