"""Cost of a layer, summed over its children."""

import math

from torch import Tensor, nn

from ..cost import Cost
from .base import FactoredModule
from .int8_layer import Int8Layer
from .transposed_linear import LowRankTransposedLinear
from .weights import weight_of


def layer_cost(module: nn.Module, input_shape: tuple[int, ...] | None = None) -> Cost:
    """Counts parameters, bytes and multiply-accumulates of a dense or factored layer.

    Bytes are those of its parameters and of the buffers that are saved with them, such as the order of pivots. The
    codes of a weight in int8 count as parameters.

    Args:
        module: a linear layer, convolution, embedding or embedding bag of torch, or a layer of this library.
        input_shape: shape of one sample without the batch dimension; by default MACs are counted as 0.

    Examples:
        >>> lr.layer_cost(nn.Conv2d(3, 8, 3, bias=False), (3, 10, 10))
        Cost(params=216, macs=13824, bytes=864)
    """
    total = Cost()
    if isinstance(module, (FactoredModule, Int8Layer)):
        total += Cost(bytes=buffer_bytes(module))
    if isinstance(module, FactoredModule) and input_shape is not None:
        total += Cost(macs=module.own_macs(input_shape))
    for child in module.parts if isinstance(module, FactoredModule) else [module]:
        macs, input_shape = _forward(child, input_shape)
        parameters = list(child.parameters())
        total += Cost(sum(p.numel() for p in parameters) + codes(child), macs, sum(map(_bytes, parameters)))
    return total


def codes(module: nn.Module) -> int:
    """Returns how many numbers of a module are stored in int8.

    Args:
        module: a layer or a whole model.
    """
    return sum(layer.codes.numel() for layer in module.modules() if isinstance(layer, Int8Layer))


def buffer_bytes(module: nn.Module) -> int:
    """Returns the bytes of the buffers of a factored layer, or one in int8, that are saved with its parameters.

    Args:
        module: the layer.
    """
    state = module.state_dict(keep_vars=True).values()
    return sum(_bytes(tensor) for tensor in state if not isinstance(tensor, nn.Parameter))


def layer_writes(module: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Counts the values that a dense or factored layer writes per sample, including those between its children.

    Args:
        module: a linear layer, convolution, embedding or embedding bag of torch, or a layer of this library.
        input_shape: shape of one sample without the batch dimension.
    """
    total, shape = module.own_writes(input_shape) if isinstance(module, FactoredModule) else 0, input_shape
    for child in module.parts if isinstance(module, FactoredModule) else [module]:
        following = _forward(child, shape)[1]
        if following is None:
            break
        shape = following
        total += math.prod(shape)
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _forward(module: nn.Module, shape: tuple[int, ...] | None) -> tuple[int, tuple[int, ...] | None]:
    """Returns the multiply-accumulates per sample of one torch layer, and the shape of its output."""
    if shape is None:
        return 0, None
    weight = module.codes if isinstance(module, Int8Layer) else weight_of(module)
    if isinstance(module, nn.Linear):
        return math.prod(shape[:-1]) * weight.numel(), (*shape[:-1], module.out_features)
    if isinstance(module, nn.Embedding):
        return 0, (*shape, module.embedding_dim)
    if isinstance(module, nn.EmbeddingBag):
        return 0, (module.embedding_dim,)
    if LowRankTransposedLinear.stands_for(module):
        return math.prod(shape[:-1]) * weight.numel(), (*shape[:-1], weight.shape[1])
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return math.prod(shape[1:]) * weight.numel(), (module.out_channels, *transposed_output_size(module, shape[1:]))
    if isinstance(module, nn.modules.conv._ConvNd):
        size = conv_output_size(module, shape[1:])
        return math.prod(size) * weight.numel(), (module.out_channels, *size)
    return 0, None


def conv_output_size(conv: nn.modules.conv._ConvNd, size: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the spatial size of a convolution's output, by torch.nn's formula."""
    result = []
    for axis, n in enumerate(size):
        d, k, s = conv.dilation[axis], conv.kernel_size[axis], conv.stride[axis]
        p = {"same": d * (k - 1), "valid": 0}[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[axis]
        result.append((n + p - d * (k - 1) - 1) // s + 1)
    return tuple(result)


def transposed_output_size(conv: nn.modules.conv._ConvTransposeNd, size: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the spatial size of a transposed convolution's output, by torch.nn's formula."""
    result = []
    for axis, n in enumerate(size):
        s, p, d, k = (int(v[axis]) for v in (conv.stride, conv.padding, conv.dilation, conv.kernel_size))
        result.append((n - 1) * s - 2 * p + d * (k - 1) + conv.output_padding[axis] + 1)
    return tuple(result)
