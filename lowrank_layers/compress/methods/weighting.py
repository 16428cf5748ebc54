"""A kernel weighted on its two channel modes."""

from torch import Tensor, nn

from ...calibrate.statistics import LayerStats
from ...layers import bias_of, is_transposed
from ...layers.kernel import kernel_of
from ...linalg import Root, damp, fold, psd_root, unfold
from .regression import Regression, regressions


def kernel_problems(conv: nn.Module, stats: LayerStats | None) -> list[Regression]:
    """The problems of a convolution on its kernels ``[out, in*area]``, one a group.

    Plain approximation does not care how a kernel is laid out, so that without statistics a transposed convolution is
    taken for the other kind.
    """
    if not is_transposed(conv):
        return regressions(conv, stats)
    assert stats is None
    kernels = kernel_of(conv).detach().flatten(2)
    bias = bias_of(conv)
    biases = [None] * len(kernels) if bias is None else bias.unflatten(0, (len(kernels), -1))
    return [Regression.of(k, b, None, centred=False) for k, b in zip(kernels, biases, strict=True)]


def weighted_kernel(conv: nn.Module, problem: Regression) -> tuple[Tensor, Root]:
    """One group's kernel weighted on both channel modes, and the root of the channels' own moment.

    The moment of patches does not separate into channels and positions; its channel blocks are averaged.
    """
    shape = kernel_of(conv).shape[1:]
    out, channels = shape[:2]
    area = problem.weight.shape[1] // channels
    kernel = problem.weight.reshape(out, channels, area)
    moment = problem.moment
    if moment.ndim == 1:
        channel = moment.reshape(channels, area).mean(1)
    else:
        blocks = moment.reshape(channels, area, channels, area)
        channel = damp(blocks.diagonal(dim1=1, dim2=3).mean(-1), 1e-6)
    root = psd_root(channel)
    kernel = problem.output.times(kernel.flatten(1)).reshape_as(kernel)
    return fold(root.times(unfold(kernel, 1)), 1, kernel.shape).reshape(shape), root
