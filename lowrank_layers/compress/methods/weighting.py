"""A kernel weighted on its two channel modes."""

from torch import Tensor, nn

from ...linalg import Root, damp, fold, psd_root, unfold
from .regression import Regression


def weighted_kernel(conv: nn.Conv2d, problem: Regression) -> tuple[Tensor, Root]:
    """The kernel weighted on both channel modes, and the root of the channels' own moment.

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
    root = psd_root(channel)
    kernel = problem.output.times(kernel.flatten(1)).reshape_as(kernel)
    return fold(root.times(unfold(kernel, 1)), 1, kernel.shape).reshape(conv.weight.shape), root
