"""The differences between versions of transformers, 5.2 and later: the only file that knows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ...errors import CheckpointError


class LayerInterface(CacheLayerMixin):
    """The class attributes and names that one version or another asks of a layer."""

    is_sliding = False
    # True makes generate compile by itself, and 5.2 ... 5.4 refuse assisted decoding
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # 5.2 ... 5.13 take no arguments

    def get_max_length(self) -> int:
        """No limit that masks have to know of."""
        return -1

    get_max_cache_shape = get_max_length  # until 5.19

    def offload(self) -> None:
        """Does nothing: the cache stays where the model is."""

    def prefetch(self) -> None:
        """Does nothing: the cache stays where the model is."""

    def activate_past_recording(self) -> None:
        """Does nothing: all tokens that a crop could ask for are kept."""


def query_length(given: int | Tensor) -> int:
    """The number of queries, from the argument of ``get_mask_sizes``: until 5.3 that is their positions.

    Args:
        given: a number, or positions.
    """
    if isinstance(given, Tensor):
        return given.shape[0] if given.ndim else int(given)
    return given


def cropped_length(amount: int | Tensor, length: int) -> int:
    """The length that ``crop`` leaves.

    Until 5.13 generate crops at every assisted step to a length that may be the present one; 5.14 gives a tensor.

    Args:
        amount: a positive number is a length (until 5.19), a negative one (from 5.14) how many tokens to remove.
        length: length of the cache.
    """
    amount = int(amount)
    return min(length, amount) if amount > 0 else max(0, length + amount)


def layers_of_config(config: Any) -> list[Any]:
    """The layers that transformers itself makes for a model; ``None`` for each that is plain attention.

    Args:
        config: configuration of the model.
    """
    return [None if type(layer) is DynamicLayer else layer for layer in DynamicCache(config=config).layers]


def plain_layer() -> DynamicLayer:
    """A layer that keeps everything exact."""
    return DynamicLayer()


def forget(layer: Any) -> None:
    """Empties a layer: until 5.17 transformers' own were filled with zeros and kept their length.

    Args:
        layer: a layer of ours or of transformers.
    """
    layer.reset()
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False


def caches_latents(module: nn.Module | None) -> bool:
    """Whether an attention is an MLA that caches its latents (from 5.15), which are few already.

    Args:
        module: the attention, if it is known.
    """
    return hasattr(module, "expand_kv")


def exact_layer_to_tensors(layer: Any, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One of transformers' own layers as a body for json and named tensors.

    Args:
        layer: the layer.
        index: its index, for messages.

    Raises:
        CheckpointError: for a layer that is no attention.
    """
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise CheckpointError(
            f"save: layer {index} is a {type(layer).__name__}, expected attention; it cannot be saved."
        )
    body = {
        "exact": True,
        "window": getattr(layer, "sliding_window", None),
        "tokens": layer.get_seq_length(),
    }
    return body, {} if layer.keys is None else {"keys": layer.keys, "values": layer.values}


def exact_layer_from_tensors(body: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Inverse of :func:`exact_layer_to_tensors`.

    Args:
        body: the body that it returned.
        tensors: the tensors that it returned.
    """
    window = body["window"]
    layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    if tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
    if window is not None:
        layer.cumulative_length = body["tokens"]
    return layer
