"""The keys and values of one layer: first and recent tokens as they are, those between as coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LowRankError
from ..rank import Rank
from ..settings import settings_from
from . import decode_step
from .append_kernel import append_token
from .attend import attend
from .autocast import without_autocast
from .compressed_tokens import CompressedTokens
from .first_fits import FirstFits
from .leaving_tokens import LeavingTokens
from .masks import causal_mask
from .padded_tokens import PaddedTokens
from .recent_tokens import RecentTokens
from .rope import Rotation
from .segments import CompressedSegment, ExactSegment, Segment
from .settings import KVSettings
from .subspace import Subspace
from .tile_frame import TileFrame
from .token_checks import check_alike, check_finite, check_form
from .transform import Transform

SIDES = ("keys", "values")


class LowRankKV:
    r"""A key/value cache of one attention layer that stores old tokens at low rank and attends without rebuilding them.

    The first tokens (attention sinks) and the most recent ones are exact. The others are
    :math:`k_i \approx \bar k + B c_i`, so that :math:`q^T k_i = q^T \bar k + (q^T B) c_i` and
    :math:`\sum_i p_i v_i = \bar v \sum_i p_i + B \sum_i p_i c_i` need the coefficients only. The subspace is fitted to
    the first tokens that are compressed and then frozen, until it fits a block much worse than those.

    Args:
        settings: a :class:`KVSettings`, which documents the options, or a rank; ``None`` takes the defaults.
        rotation: the rotary position embedding that keys carry when they come, so that it can be taken off; ``None``
            where there is none.
        subspaces: a pair from calibration, for keys and values, each with a batch of one: transforms with bits,
            subspaces with a rank; ``None`` fits them to the tokens.
        **changes: options of :class:`KVSettings` by name; they replace those of ``settings``.

    Shape:
        keys and values ``[batch, heads, tokens, size]``; queries have a multiple of the heads.

    Examples:
        >>> cache = lr.LowRankKV(rank=8, keep_recent=16, rotation=lr.Rotation.of(64))
        >>> k, v = torch.randn(2, 1, 2, 600, 64)
        >>> cache.append(k, v)
        >>> exact = cache.attend(q := torch.randn(1, 8, 1, 64))
        >>> cache.compress()
        >>> cache.attend(q).shape, len(cache), round((k.nbytes + v.nbytes) / cache.nbytes(), 1)
        (torch.Size([1, 8, 1, 64]), 600, 3.5)
    """

    _due = 0
    """Number of recent tokens from which on some are compressed, as it was when that was looked at last."""

    def __init__(
        self,
        settings: KVSettings | Rank | None = None,
        rotation: Rotation | None = None,
        subspaces: tuple[Subspace, Subspace] | tuple[Transform, Transform] | None = None,
        **changes: Any,
    ) -> None:
        self.settings = settings_from(KVSettings, settings, changes, "LowRankKV")
        self.rotation = None if self.settings.rotated == "after" else rotation
        self.fits = FirstFits.of(self.settings, subspaces)
        self.waits_for_budget = False
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.fits.budgeted = None
        self.first: tuple[Tensor, Tensor] | None = None
        self.old: tuple[CompressedTokens, CompressedTokens] | None = None
        self.recent: tuple[RecentTokens, RecentTokens] | None = None
        self.padding = PaddedTokens(self.settings.keep_first)

    def __len__(self) -> int:
        first = 0 if self.first is None else self.first[0].shape[2]
        old = 0 if self.old is None else self.old[0].tokens
        return first + old + (0 if self.recent is None else self.recent[0].tokens)

    @property
    def compressed(self) -> int:
        """Number of tokens that are stored as coefficients."""
        return 0 if self.old is None else self.old[0].tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds tokens, exact as they are.

        Args:
            keys: ``[batch, heads, tokens, size]``.
            values: ``[batch, heads, tokens, size]``, possibly of another size.

        Raises:
            LowRankError: for no tokens, other shapes, dtypes or devices than before, NaN or Inf, or more than
                ``max_length``; nothing is appended then.
        """
        if self.recent is not None and self.settings.max_length is None and append_token(self.recent, keys, values):
            return
        self._check(keys, values)
        if self.recent is None:
            room = self.settings.recent + self.settings.block_on(keys.device)
            self.recent = RecentTokens(keys, room), RecentTokens(values, room)
        for recent, x in zip(self.recent, (keys, values), strict=True):
            recent.append(x)

    def hide(self, mask: Tensor | None) -> None:
        """Learns which of the last step's tokens are padding: they count in no fit, and a row's first tokens follow it.

        Args:
            mask: the mask of that step, as in :meth:`attend`, or ``[batch, tokens]``; ``None`` hides none. Tokens that
                no query attends to are padding.
        """
        tokens = len(self)
        if self.old is not None and (mask is None or tokens - self.padding.masked == 1):
            self.padding.masked = tokens
            return
        self.padding.learn(mask, len(self.like()), tokens)
        self._find_starts()

    def attend(
        self,
        query: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        causal: bool = True,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Softmax attention of the last tokens' queries to all tokens of the cache.

        Args:
            query: ``[batch, query heads, q, size]``, for the last ``q`` tokens.
            mask: ``[batch, 1 or query heads, q, tokens]``: true where to attend, or what to add to the scores.
            scale: factor of the scores; ``None`` is ``size^(-1/2)``.
            causal: where there is no mask, whether a query sees the tokens up to its own only.
            softcap: bounds the scores by ``softcap tanh(score / softcap)``.
            sinks: ``[query heads]``, one logit per head that takes part in the softmax and has no value.
        """
        starts = self.padding.starts
        if mask is None and softcap is None and sinks is None and starts is None:
            found = decode_step.attention(query, self.first, self.recent, self.old, self.rotation, scale)
            if found is not None:
                return found
        if starts is not None and self.first is not None and (mask is None or mask.shape[-1] == len(self)):
            if mask is None:
                mask = causal_mask(query.shape[2], len(self), query.device)
                mask = mask if causal else torch.ones_like(mask)
            mask = starts.arranged(mask)
        return attend(query, self.segments(), mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks)

    def segments(self) -> list[Segment]:
        """All tokens: first, old and recent ones, as they are stored."""
        if self.recent is None:
            raise LowRankError("LowRankKV: the cache is empty; append keys and values first.")
        found: list[Segment] = [] if self.first is None else [ExactSegment(*self.first)]
        if self.old is not None:
            found.append(CompressedSegment(*self.old, self.rotation, self._first_tokens(), self.padding.starts))
        keys, values = self.recent
        return [*found, ExactSegment(keys.read(), values.read())] if keys.tokens or not found else found

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values, rebuilt: for an attention that knows nothing of coefficients."""
        return self.side(0), self.side(1)

    def side(self, index: int) -> Tensor:
        """All keys or all values, rebuilt.

        Args:
            index: 0 for keys, 1 for values.
        """
        segments, like, starts = self.segments(), self.like(index), self.padding.starts
        with without_autocast(like.device):
            whole = torch.cat([(x.dense_values if index else x.dense_keys)(like.dtype) for x in segments], 2)
            return whole if starts is None or self.first is None else starts.placed(whole)

    def compress(self) -> None:
        """Turns tokens that are neither first nor recent into coefficients, once there is a block of them."""
        if self.recent is None:
            return
        held = self.recent[0].tokens
        if self.old is not None and held < self._due:
            return  # as in most steps, where every microsecond is seen
        device, count = self.like().device, held - self.settings.recent
        self._due = self.settings.recent + self.settings.block_on(device)
        if self.old is not None and held < self._due:
            return
        with torch.no_grad(), without_autocast(device):
            if self.old is None:
                self._fit()
            else:
                limits = self._limits()
                keep = None if limits == [None, None] else self.counting(-self.compressed, count)
                for side, tokens, limit in zip(self.old, self._leaving(0, count), limits, strict=True):
                    side.extend(tokens, limit, keep)
                self._drop(count)

    def crop(self, tokens: int) -> None:
        """Keeps the first tokens.

        Args:
            tokens: how many.
        """
        tokens = max(0, min(tokens, len(self)))
        if tokens == 0:
            self.reset()
            return
        assert self.recent is not None
        padding = self.padding
        if padding.starts is not None and self.first is not None and tokens < padding.starts.most:
            # a row loses first tokens: all are as they came again
            whole = [side[:, :, :tokens].clone() for side in self.dense()]
            self.reset()
            self.append(whole[0], whole[1])
            self.padding = padding
        first, before = self._first_tokens(), self._before_recent()
        for recent in self.recent:
            recent.truncate(max(0, tokens - before))
        if self.old is not None and tokens < before:
            if tokens <= first:
                self.old = None
            else:
                for side in self.old:
                    side.truncate(tokens - first)
        if self.first is not None and tokens < first:
            keys, values = (t[:, :, :tokens].contiguous() for t in self.first)
            self.first = keys, values
        self.padding.crop(tokens)
        self._find_starts()

    def select(self, index: Tensor) -> None:
        """Takes rows of the batch (beam search, finished rows).

        Args:
            index: indices of the rows, in their new order.
        """
        self._over_batch(lambda t: t.index_select(0, index.to(t.device)))

    def repeat(self, times: int) -> None:
        """Repeats every row of the batch.

        Args:
            times: how often.
        """
        self._over_batch(lambda t: t.repeat_interleave(times, 0))

    def nbytes(self) -> int:
        """Bytes of all that is stored, including room for more tokens; what belongs to the model counts nothing."""
        return sum(t.nbytes for _, t in self.tensors()) - self.shared_nbytes()

    def shared_nbytes(self) -> int:
        """Bytes of what is stored and belongs to the model, from calibration."""
        return sum(side.shared_nbytes() for side in self.old or ())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is stored."""
        for index, side in enumerate(SIDES):
            if self.first is not None:
                yield f"{side}.first", self.first[index]
            if self.old is not None:
                for name, tensor in self.old[index].tensors():
                    yield f"{side}.{name}", tensor
            if self.recent is not None:
                yield f"{side}.tail", self.recent[index].buffer
        if self.padding.keep is not None:
            yield "keep", self.padding.keep

    def like(self, side: int = 0) -> Tensor:
        """A tensor with the batch, heads, size, dtype and device of keys or values.

        Args:
            side: 0 for keys, 1 for values.
        """
        assert self.recent is not None
        return self.recent[side].buffer

    def first_fit(self) -> tuple[int, int] | None:
        """The range of recent tokens that a first fit compresses; ``None`` where there is no block of them yet."""
        if self.recent is None:
            return None
        stop = self.recent[0].tokens - self.settings.recent
        skip = self.settings.keep_first if self.first is None else 0
        starts = self.padding.starts
        if starts is not None and starts.most > len(self):
            return None  # a row has padding only
        least = 0 if starts is None else starts.least
        return (skip, stop) if stop - skip - least >= self.settings.at_first else None

    def leaving(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys without their rotation, and values, of a range of recent tokens, in fp32.

        Args:
            start: index of the first token among the recent ones.
            stop: index after the last one.
        """
        keys, values = self._leaving(start, stop)
        return keys.plain, values.plain

    def counting(self, start: int, stop: int) -> Tensor | None:
        """Which tokens of a range count in a fit, being neither padding nor among a row's first; ``None`` if all do.

        Args:
            start: index of the first token among the recent ones; negative for compressed ones.
            stop: index after the last one.
        """
        before = self._before_recent()
        return self.padding.counting(before + start, before + stop)

    def _leaving(self, start: int, stop: int) -> tuple[LeavingTokens, LeavingTokens]:
        assert self.recent is not None
        keys, values = (recent.read()[:, :, start:stop] for recent in self.recent)
        first, positions = self._before_recent() + start, None
        if (starts := self.padding.starts) is not None:
            positions = starts.positions(torch.arange(first, first + stop - start, device=keys.device))
        return LeavingTokens(keys, self.rotation, first, positions), LeavingTokens(values)

    def _fit(self) -> None:
        """The first fit."""
        span = self.first_fit()
        if span is None or self.waits_for_budget:
            return
        assert self.recent is not None
        sides, keep, least = self._leaving(*span), self.counting(*span), self.settings.at_first
        fits = self.fits(sides, self.frame(), keep)
        keys, values = (fit(x, keep, least) for fit, x in zip(fits, sides, strict=True))
        skip, count = span
        if skip:
            starts = self.padding.starts
            first_keys, first_values = (
                recent.read()[:, :, :skip].clone() if starts is None else starts.taken(recent.read())
                for recent in self.recent
            )
            self.first = first_keys, first_values
        self.old = keys, values
        self._drop(count)

    def frame(self) -> TileFrame | None:
        """The frame in which keys are stored; ``None`` is their own."""
        if self.rotation is None or self.settings.rotated != "tile":
            return None
        return TileFrame(self.rotation, self.like().shape[3])

    def _drop(self, count: int) -> None:
        assert self.recent is not None
        for recent in self.recent:
            recent.drop(count)

    def _limits(self) -> list[float | None]:
        """The part of a block's energy that each side may lose before its subspace is fitted again."""
        assert self.old is not None
        factor = self.settings.refresh
        # looking at the error waits for the device, and breaks a compiled graph
        if factor is None or torch.compiler.is_compiling():
            return [None, None]
        return [factor * side.discarded + 1e-4 for side in self.old]

    def _first_tokens(self) -> int:
        return 0 if self.first is None else self.first[0].shape[2]

    def _find_starts(self) -> None:
        """Where rows begin, until first tokens are kept."""
        if self.first is None and self.old is None:
            self.padding.find_starts()

    def _before_recent(self) -> int:
        return self._first_tokens() + self.compressed

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.first is not None:
            keys, values = map(change, self.first)
            self.first = keys, values
        for store in (*(self.old or ()), *(self.recent or ())):
            store.over_batch(change)
        self.padding.over_batch(change)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        check_form(keys, values)
        for index, (name, x) in enumerate(zip(SIDES, (keys, values), strict=True)):
            if self.recent is not None:
                check_alike(x, self.recent[index].buffer, name)
                continue
            rank = self.settings.rank_of(values=index == 1)
            if self.settings.by_rank and isinstance(rank, int) and rank > x.shape[3]:
                raise LowRankError(
                    f"LowRankKV: got rank {rank} for {name} of {x.shape[3]} entries per head, expected at most that"
                    " many."
                )
        limit = self.settings.max_length
        if limit is not None and len(self) + keys.shape[2] > limit:
            raise LowRankError(
                f"LowRankKV: got {keys.shape[2]} more tokens after {len(self)}, expected at most max_length={limit}."
            )
        check_finite(keys, values)
