"""One attention layer of a cache, as transformers sees it."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import LowRankError
from ..low_rank_kv import LowRankKV
from .attention import NAME
from .lazy_kv import Handle, LazyKV
from .versions import LayerInterface, cropped_length, query_length


class LowRankLayer(LayerInterface):
    """A layer of a :class:`LowRankCache`: a :class:`LowRankKV` once there are tokens, which show size and dtype.

    It is true also when it is empty, as transformers' layers are.
    """

    kv: LowRankKV | None = None
    lazy = False

    def __len__(self) -> int:
        return 0 if self.kv is None else len(self.kv)

    def __bool__(self) -> bool:
        return True

    @property
    def compressed(self) -> int:
        """Number of tokens that are stored as coefficients."""
        return 0 if self.kv is None else self.kv.compressed

    @property
    def keys(self) -> Tensor | None:
        """All keys, old ones rebuilt from their coefficients; ``None`` before there are any.

        What is written into the tensor does not change the cache. Cross-attentions of transformers read their keys here
        from the second step on; for the attention ``"lowrank"`` nothing is rebuilt.
        """
        return self._side(0)

    @keys.setter
    def keys(self, given: Tensor | None) -> None:
        self._refuse(given)

    @property
    def values(self) -> Tensor | None:
        """All values, likewise."""
        return self._side(1)

    @values.setter
    def values(self, given: Tensor | None) -> None:
        self._refuse(given)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes nothing: only :class:`LowRankCache` knows the settings."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens and returns all of them, old ones rebuilt, for an attention that needs whole tensors."""
        assert self.kv is not None, "a LowRankCache makes it"
        self.lazy = False
        keys, values = key_states.detach(), value_states.detach()
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            past = self.kv.dense() if len(self.kv) else None
            self.kv.append(keys, values)
            self._compress(mask)
            if past is None:
                return key_states, value_states
            return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        self.kv.append(keys, values)
        found = self.kv.dense()
        self._compress(mask)  # only now: what came in this step is attended to as it is
        return found

    def update_lazily(self, key_states: Tensor, value_states: Tensor) -> tuple[Any, Any]:
        """Adds tokens and returns what the attention ``"lowrank"`` reads; it compresses when it is done."""
        assert self.kv is not None, "a LowRankCache makes it"
        self.kv.compress()  # the last step may have had another attention, which did not
        self.kv.append(_detached(key_states), _detached(value_states))
        self.lazy = True
        if torch.compiler.is_compiling():
            handle = Handle(self.kv)
            return handle, handle
        return LazyKV.both(self.kv)

    def get_mask_sizes(self, query_length_: int | Tensor) -> tuple[int, int]:
        """The number of tokens after the next step, and the index of the first one."""
        return len(self) + query_length(query_length_), 0

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return len(self)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes tokens at the end: a negative number is how many, a positive one the length that is left."""
        if self.kv is not None:
            self.kv.crop(cropped_length(tokens_to_remove, len(self)))

    def reset(self) -> None:
        """Forgets all tokens."""
        self.kv = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes one row of the batch for every beam."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes these rows of the batch."""
        if self.kv is not None:
            self.kv.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.kv is not None:
            self.kv.repeat(repeats)

    def _compress(self, mask: Tensor | None) -> None:
        assert self.kv is not None
        if not torch.compiler.is_compiling():
            self.kv.hide(mask)
        self.kv.compress()

    def _side(self, index: int) -> Tensor | None:
        if not len(self):
            return None
        assert self.kv is not None
        if torch.compiler.is_compiling():
            # a graph can neither look at frames nor make what looks like a tensor
            return cast(Tensor, Handle(self.kv)) if self.lazy else self.kv.side(index)
        # tensors for all but the attention that can do without
        reader = sys._getframe(2).f_locals.get("self")
        named = getattr(getattr(reader, "config", None), "_attn_implementation", None)
        if named == NAME and isinstance(reader, nn.Module) and getattr(reader, "layer_idx", None) is not None:
            self.kv.compress()  # of a step whose attention joined them with other tokens
            return LazyKV.both(self.kv)[index]
        return self.kv.side(index)

    def _refuse(self, given: Tensor | None) -> None:
        if given is not None:
            raise LowRankError(
                "LowRankCache: got keys or values to put in place of a layer's, expected update() for more tokens,"
                " crop() and batch_select_indices() for fewer; a DynamicCache takes others in place of its own."
            )


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x
