"""The cache for ``past_key_values=`` of transformers' models."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ...errors import LowRankError
from ...rank import Rank
from ...settings import settings_from
from ..budget import check_budget, compress_together
from ..kv_transforms import KVTransforms
from ..settings import KVSettings
from ..subspace import Subspace
from . import cache_file, errors
from .attention import NAME
from .cache_file import CacheContents
from .calling_model import calling_module, depth_of, is_cross_attention, mask_of, text_config
from .continuous_batching import refuse_continuous_batching
from .layer import LowRankLayer
from .layer_factory import LayerFactory
from .versions import caches_latents, forget, layers_of_config, plain_layer

_NONE_YET = sys.maxsize


class LowRankCache(DynamicCache):
    """A key/value cache for models of transformers that stores old tokens at low rank.

    It can be used wherever a ``DynamicCache`` can: in ``generate`` with every way of decoding, and in a model's own
    call. With ``model.set_attn_implementation("lowrank")`` attention reads the coefficients, and old keys and values
    are never rebuilt as a whole; any other implementation gets them rebuilt at every step, which saves no time. The
    tokens of a step are attended to exactly and compressed afterwards, so that a prompt's own logits are exact.

    On SmolLM2-135M with a prompt of 2,048 tokens of WikiText, directions calibrated on other WikiText take 5.0, 7.5 and
    14.2 times fewer bytes than bf16 at 0.0, 0.1 and 4.0 % more perplexity, all bytes of a sequence counted; the
    default, fitted to the prompt, takes 4.1 times fewer at 0.1 %. At 8,192 tokens a step takes 0.71 of the time that it
    takes with ``DynamicCache`` and SDPA (fp32, two threads of a CPU with AVX-512), at 2,048 tokens as much; on one with
    AVX2 alone 0.71 and 1.01 of it (``benchmarks/results/kv_real_cpu_202611.md``).

    A prompt that several requests share is read once: each request takes ``copy.deepcopy(cache)``, a file, or a row of
    ``batch_repeat_interleave``, and gets the tokens that a new cache gives which is filled in the same steps. Reading
    prompt and request in one step is another computation, equal at full rank only: then the request is attended to
    before the prompt is compressed, and is part of the first fit. Rows of one batch are independent but for
    ``refresh``, which looks at the error of all of them. ``crop`` back to the prompt leaves it as it is stored, so that
    recent tokens which were compressed meanwhile stay so.

    An encoder-decoder takes two, ``EncoderDecoderCache(LowRankCache(...), LowRankCache(...))``: the second compresses
    the encoder's keys and values, and a ``DynamicCache()`` in its place keeps them exact. ``cache.layers[i].keys`` and
    ``.values``, and a loop over the cache, give tensors as a ``DynamicCache`` does, old tokens rebuilt.

    MLA layers that cache latents stay exact. Without ``config`` a layer with a sliding window keeps all tokens (its
    mask hides the old ones), as in a ``DynamicCache()``. Looking up this class registers the name ``"lowrank"`` in
    transformers, so look it up before the name is used. Continuous batching (``generate_batch``) keeps pages of its own
    and raises an error.

    Args:
        settings: a :class:`KVSettings`, which documents the options, or a rank; ``None`` takes the defaults.
        budget: what the cache may take after the prompt, in place of bits or ranks: a part of the exact cache (a float)
            or a number of bytes (an integer). Layers, keys, values and heads share it as :func:`compress_together`
            describes, one step after the prompt.
        subspaces: directions from calibration, which belong to the model and take no bytes of a sequence:
            :class:`KVTransforms` with bits, as :func:`calibrate_kv` makes them, or a pair of subspaces per layer with a
            rank, from :func:`kv_subspaces`; ``None`` fits them to the tokens.
        config: the model's configuration: layers with a sliding window, and others that are no plain attention, become
            transformers' own.
        offloading: not offered; any value but ``None`` raises an error.
        **changes: options of :class:`KVSettings` by name; they replace those of ``settings``.

    Raises:
        LowRankError: for settings out of range; in use for no tokens, NaN, more tokens than ``max_length``, or another
            model, batch, dtype or device than before; the cache then is as long as it was.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).eval()
        >>> cache = lr.LowRankCache(rank=4, keep_recent=32)
        >>> model.set_attn_implementation("lowrank")
        >>> prompt = torch.randint(3, 99, (1, 200))
        >>> out = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
        >>> out.shape[1], cache.get_seq_length(), cache.layers[0].compressed
        (208, 207, 164)

        Two requests that begin with the same prompt:

        >>> import copy
        >>> shared, requests = lr.LowRankCache(rank=4, keep_recent=32), torch.randint(3, 99, (2, 1, 10))
        >>> with torch.no_grad():
        ...     _ = model(prompt, past_key_values=shared)
        >>> for request in requests:
        ...     ids, cache = torch.cat([prompt, request], 1), copy.deepcopy(shared)
        ...     out = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
        >>> shared.get_seq_length(), cache.get_seq_length()
        (200, 217)
    """

    def __init__(
        self,
        settings: KVSettings | Rank | None = None,
        *,
        budget: float | int | None = None,
        subspaces: KVTransforms | Sequence[tuple[Subspace, Subspace]] | None = None,
        config: Any = None,
        offloading: bool | None = None,
        **changes: Any,
    ) -> None:
        if offloading is not None:
            raise errors.offloading(offloading)
        self.settings = settings_from(KVSettings, settings, changes, "LowRankCache")
        if budget is not None:
            check_budget(budget)
            if subspaces is not None and not isinstance(subspaces, KVTransforms):
                raise errors.budget_and_subspaces()
            if self.settings.by_rank:  # it is not used, and one is allowed for heads of any size
                self.settings = replace(self.settings, rank=1, value_rank=None)
        if isinstance(subspaces, KVTransforms):
            subspaces.check(self.settings)
        self.budget = budget
        self._factory = LayerFactory(self.settings, subspaces, waits_for_budget=budget is not None)
        self._config = None if config is None else text_config(config)
        made = [] if config is None else layers_of_config(config)
        Cache.__init__(self, layers=[LowRankLayer() if layer is None else layer for layer in made])
        self._given = bool(made)
        self.depth: int | None = None
        self._latest = _NONE_YET
        self._before = 0
        self._reads_coefficients = False
        self._warned = False

    # mypy reads the signature of the newest version
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens to a layer.

        Args:
            key_states: ``[batch, heads, tokens, size]``, rotated.
            value_states: ``[batch, heads, tokens, size]``, possibly of another size.
            layer_idx: index of the layer.
            *args: arguments of older versions, handed on to layers of transformers.
            **kwargs: likewise.

        Returns:
            All keys and values: as tensors, or as what the attention ``"lowrank"`` reads coefficients from.
        """
        if torch.compiler.is_compiling():
            if not self._is_made(layer_idx):
                raise errors.compiled()
            return self._update(self.layers[layer_idx], None, key_states, value_states, *args, **kwargs)
        begins, frame = layer_idx <= self._latest, sys._getframe(1)
        try:
            if not begins and self._is_made(layer_idx):
                self._latest = layer_idx
                return self._update(self.layers[layer_idx], frame, key_states, value_states, *args, **kwargs)
            module = calling_module(frame)
            cross = is_cross_attention(self, module, frame)
            if cross and super().get_seq_length(layer_idx):
                raise errors.alone(module)
            if begins:
                self._before = super().get_seq_length()
                self._share_budget()
                self._bind(module)
                self._reads_coefficients = self._named()
            self._latest = layer_idx
            layer = self._layer(layer_idx, module)
            if isinstance(layer, LowRankLayer) and layer.kv is None:
                layer.kv = (
                    self._factory.of_encoder()
                    if cross
                    else self._factory.of_decoder(layer_idx, key_states, module, self._config)
                )
            return self._update(layer, frame, key_states, value_states, *args, **kwargs)
        except LowRankError:
            self._undo()
            raise

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens so far.

        Args:
            layer_idx: index of the layer.
        """
        found = int(super().get_seq_length(layer_idx))
        if not found and not torch.compiler.is_compiling():
            errors.check_not_alone(self, sys._getframe(1))
        return found

    def is_filled(self) -> bool:
        """Whether every layer has tokens: the first pass through the model is over."""
        lengths = [layer.get_seq_length() for layer in self.layers if isinstance(layer, LowRankLayer)]
        return len(self.layers) >= (self.depth or 1) and bool(lengths) and min(lengths) > 0

    def nbytes(self) -> int:
        """Bytes of all that is stored, including room for more tokens.

        What layers share counts once. What is the model's, calibrated directions, counts nothing:
        :meth:`KVTransforms.nbytes` has its bytes, which all sequences share.
        """
        held = [layer.kv for layer in self.layers if isinstance(layer, LowRankLayer) and layer.kv is not None]
        shared = sum(kv.shared_nbytes() for kv in held)
        rotations = sum(rotation.nbytes() for rotation in self._factory.rotations)
        return sum(tensor.nbytes for _, tensor in self.tensors()) - shared + rotations

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is stored."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, LowRankLayer):
                for name in ("keys", "values"):
                    if isinstance(tensor := getattr(layer, name, None), Tensor):
                        yield f"{index}.{name}", tensor
            elif layer.kv is not None:
                for name, tensor in layer.kv.tensors():
                    yield f"{index}.{name}", tensor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache into a safetensors file, so that a long prompt need not be read again.

        Args:
            path: the file, usually ``*.safetensors``.

        Raises:
            CheckpointError: for layers other than attention, and folders that do not exist.
        """
        cache_file.save(CacheContents(self.settings, list(self.layers), self._factory.rotations, self.depth), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LowRankCache:
        """Reads a cache that :meth:`save` wrote; generation goes on as it would have.

        Args:
            path: the file.
            device: the device on which its tensors are put.

        Raises:
            CheckpointError: for a file that is torn or foreign.

        Examples:
            >>> import tempfile, os
            >>> path = os.path.join(tempfile.mkdtemp(), "prompt.safetensors")
            >>> cache = lr.LowRankCache(rank=8, keep_recent=16)
            >>> _ = cache.update(torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 32), 0)
            >>> cache.save(path)
            >>> lr.LowRankCache.load(path).get_seq_length()
            200
        """
        held = cache_file.load(path, torch.device(device))
        made = cls(held.settings)
        made.layers, made.depth = held.layers, held.depth
        made._factory.rotations.extend(held.rotations)
        return made

    def reset(self) -> None:
        """Forgets all tokens."""
        for layer in self.layers:
            forget(layer)
        self._factory.rotations.clear()
        self._latest, self.depth = _NONE_YET, None

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankCache:
        # the model's config stays the model's: it says which attention runs
        memo[id(self._config)] = self._config
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        # the next call says whose cache it is
        return self.__dict__ | {"_config": None, "_latest": _NONE_YET}

    def _update(
        self, layer: Any, frame: FrameType | None, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(layer, LowRankLayer):
            held, more, limit = layer.get_seq_length(), keys.shape[-2], self.settings.max_length
            if limit is not None and held + more > limit:
                raise errors.too_long(more, held, limit)
            found: tuple[Tensor, Tensor] = layer.update(keys, values, *args, **kwargs)
            return found
        learning = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        if not learning and (self._reads_coefficients if frame is not None else self._named()):
            return layer.update_lazily(keys, values)
        if layer.compressed and not torch.compiler.is_compiling():
            self._warn_of_rebuilding()
        return layer.update(keys, values, mask=None if frame is None else mask_of(frame))

    def _named(self) -> bool:
        """Whether the model's attention is the one that reads coefficients."""
        return getattr(self._config, "_attn_implementation", None) == NAME

    def _warn_of_rebuilding(self) -> None:
        """Once per cache."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "LowRankCache: this attention needs whole keys and values, which are rebuilt at every step; call"
                f' model.set_attn_implementation("{NAME}") to attend without.',
                stacklevel=4,
            )

    def _share_budget(self) -> None:
        """Compresses all layers under the budget, once they have the prompt."""
        if self.budget is None or not self.is_filled():
            return
        waiting = [layer.kv for layer in self.layers if isinstance(layer, LowRankLayer) and layer.kv is not None]
        if waiting and all(kv.waits_for_budget for kv in waiting):
            compress_together(waiting, self.budget)

    def _bind(self, module: nn.Module | None) -> None:
        """Takes the configuration of the model that calls; a used cache takes no other model's."""
        config = getattr(module, "config", None)
        if config is None:
            return
        depth = depth_of(config)
        if self.depth is not None and depth != self.depth and self._before:
            raise errors.other_depth(depth, self.depth)
        self._config, self.depth = config, depth

    def _is_made(self, layer_idx: int) -> bool:
        """Whether a layer is there that needs no first tokens to be made."""
        if layer_idx >= len(self.layers):
            return False
        layer = self.layers[layer_idx]
        return not isinstance(layer, LowRankLayer) or layer.kv is not None

    def _layer(self, layer_idx: int, module: nn.Module | None) -> Any:
        """The layer that gets tokens; new ones are added as a first pass comes to them."""
        if layer_idx >= len(self.layers) and self._before and module is None:
            raise errors.more_layers(layer_idx, len(self.layers))
        while len(self.layers) <= layer_idx:
            self.layers.append(LowRankLayer())
        layer = self.layers[layer_idx]
        if isinstance(layer, LowRankLayer) and layer.kv is None and caches_latents(module):
            layer = self.layers[layer_idx] = plain_layer()
        return layer

    def _undo(self) -> None:
        """Removes the tokens of this step from the layers that have them already."""
        self._latest = _NONE_YET
        if not self._before:
            self.reset()
            if not self._given:
                self.layers.clear()
            return
        layers: list[Any] = self.layers
        for layer in layers:
            if (more := layer.get_seq_length() - self._before) > 0:
                layer.crop(-more)


refuse_continuous_batching(LowRankCache)
