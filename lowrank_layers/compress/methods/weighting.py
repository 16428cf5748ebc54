"""A kernel weighted on its two channel modes."""

from torch import Tensor, nn

from ...linalg import damp, mode_product, psd_roots
from .regression import Regression


def weighted_kernel(conv: nn.Conv2d, problem: Regression) -> tuple[Tensor, Tensor]:
    """The kernel weighted on both channel modes, and ``X_c^(-1/2)`` of the channels' own moment.

    The moment of patches does not separate into channels and positions; its channel blocks are averaged.
    """
    out, channels, area = conv.out_channels, conv.in_channels, problem.weight.shape[1] // conv.in_channels
    kernel = problem.weight.reshape(out, channels, area)
    moment = problem.moment
    if moment.ndim == 1:
        channel = moment.reshape(channels, area).mean(1)
    else:
        blocks = moment.reshape(channels, area, channels, area)
        channel = damp(blocks.diagonal(dim1=1, dim2=3).mean(-1), 1e-6)
    roots = psd_roots(channel)
    kernel = problem.output.times(kernel.flatten(1)).reshape_as(kernel)
    inverse = roots.inverse.diag() if roots.inverse.ndim == 1 else roots.inverse
    root = roots.root.diag() if roots.root.ndim == 1 else roots.root
    return mode_product(kernel, root, 1).reshape(conv.weight.shape), inverse
