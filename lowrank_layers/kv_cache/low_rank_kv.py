"""The keys and values of one layer: first and recent tokens as they are, those between as coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LowRankError
from ..rank import Rank
from ..settings import settings_from
from .attend import Exact, Old, Piece, attend
from .autocast import without_autocast
from .compressed_tokens import Latent, grouped
from .fit import fit_latent
from .recent_tokens import Tail
from .rope import Rotation
from .settings import KVSettings
from .subspace import Scatter, Subspace


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
        subspaces: a pair of subspaces from calibration, for keys and values, each with a batch of one; ``None`` fits
            them to the tokens.
        changes: options of :class:`KVSettings` by name; they replace those of ``settings``.

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

    def __init__(
        self,
        settings: KVSettings | Rank | None = None,
        rotation: Rotation | None = None,
        subspaces: tuple[Subspace, Subspace] | None = None,
        **changes: Any,
    ) -> None:
        self.settings = settings_from(KVSettings, settings, changes, "LowRankKV")
        self.rotation = rotation if self.settings.rope == "before" else None
        self.subspaces = subspaces
        self.ranks: tuple[list[int], list[int]] | None = None
        self.waits = False  # for the other layers: see compress_together
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.first: tuple[Tensor, Tensor] | None = None
        self.old: tuple[Latent, Latent] | None = None
        self.tail: tuple[Tail, Tail] | None = None

    def __len__(self) -> int:
        return self._before_tail() + (0 if self.tail is None else self.tail[0].tokens)

    @property
    def compressed(self) -> int:
        """How many tokens are coefficients."""
        return 0 if self.old is None else self.old[0].tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """More tokens, exact as they are.

        Raises:
            LowRankError: for no tokens, other shapes, dtypes or devices than before, NaN or Inf, or more than
                ``max_length``; nothing is appended then.
        """
        self._check(keys, values)
        if self.tail is None:
            room = self.settings.keep_recent + self.settings.block
            self.tail = Tail(keys, room), Tail(values, room)
        for tail, x in zip(self.tail, (keys, values), strict=True):
            tail.append(x)

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
        """Softmax attention of the last tokens' queries; see ``lowrank_layers.kv_cache.attend``."""
        return attend(query, self.pieces(), mask=mask, scale=scale, causal=causal, softcap=softcap, sinks=sinks)

    def pieces(self) -> list[Piece]:
        """All tokens, in order."""
        if self.tail is None:
            raise LowRankError("LowRankKV: the cache is empty; append keys and values first.")
        found: list[Piece] = [] if self.first is None else [Exact(*self.first)]
        if self.old is not None:
            found.append(Old(*self.old, self.rotation, found[0].tokens if found else 0))
        keys, values = self.tail
        return [*found, Exact(keys.read(), values.read())] if keys.tokens or not found else found

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values, rebuilt: for an attention that knows nothing of coefficients."""
        return self.side(0), self.side(1)

    def side(self, index: int) -> Tensor:
        """All keys (0) or values (1), rebuilt."""
        pieces, like = self.pieces(), self._like(index)
        with without_autocast(like.device):
            return torch.cat([(p.dense_values if index else p.dense_keys)(like.dtype) for p in pieces], 2)

    @torch.no_grad()
    def compress(self) -> None:
        """Turns tokens that are neither first nor recent into coefficients, once there is a block of them."""
        if self.tail is None:
            return
        with without_autocast(self._like().device):
            self._compress()

    def crop(self, tokens: int) -> None:
        """Leaves the first ``tokens`` tokens."""
        tokens = max(0, min(tokens, len(self)))
        if tokens == 0:
            self.reset()
            return
        first, before = self._first_tokens(), self._before_tail()
        assert self.tail is not None
        for tail in self.tail:
            tail.truncate(max(0, tokens - before))
        if self.old is not None and tokens < before:
            if tokens <= first:
                self.old = None
            else:
                for latent in self.old:
                    latent.truncate(tokens - first)
        if self.first is not None and tokens < first:
            keys, values = (t[:, :, :tokens].contiguous() for t in self.first)
            self.first = keys, values

    def select(self, index: Tensor) -> None:
        """Takes these rows of the batch, in this order (beam search, finished rows)."""
        self._over_batch(lambda t: t.index_select(0, index.to(t.device)))

    def repeat(self, times: int) -> None:
        """Repeats every row of the batch."""
        self._over_batch(lambda t: t.repeat_interleave(times, 0))

    def nbytes(self) -> int:
        """All that is stored, room for more included."""
        return sum(t.nbytes for _, t in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is stored, by name."""
        for index, side in enumerate(("keys", "values")):
            if self.first is not None:
                yield f"{side}.first", self.first[index]
            if self.old is not None:
                for name, tensor in self.old[index].tensors():
                    yield f"{side}.{name}", tensor
            if self.tail is not None:
                yield f"{side}.tail", self.tail[index].buffer

    def scatters(self) -> tuple[Scatter, Scatter] | None:
        """What a first fit of keys and values would look at; ``None`` where there is no block of old tokens yet."""
        span = self._span()
        if span is None:
            return None
        with without_autocast(self._like().device):
            sides = (grouped(x, x.shape[1] if self.settings.joint else 1) for x in self._leaving(*span))
            keys, values = map(Scatter.of, sides)
        return keys, values

    def exact_nbytes(self) -> int:
        """Of all tokens, if they were stored as they came."""
        return len(self) * self._token_nbytes()

    def fixed_nbytes(self) -> int:
        """Of what a first fit leaves at any rank: exact tokens, means and scales."""
        batch, heads = self._like().shape[:2]
        first, stop = self._span() or (0, 0)
        kept = first + max(self.settings.keep_recent + self.settings.block, len(self) - stop)
        stored = [(self._like(side).shape[3], *self.settings.dtypes(self._like(side).dtype)) for side in (0, 1)]
        means = sum(batch * heads * size * bases.itemsize for size, bases, _ in stored)
        scales = 2 * (stop - first) * batch * (1 if self.settings.joint else heads)
        return kept * self._token_nbytes() + means + sum(scales for *_, dtype in stored if dtype == torch.int8)

    def direction_nbytes(self, width: int, *, values: bool = False) -> int:
        """Of one more direction of a group of that width: coefficients and basis."""
        bases, coefficients = self.settings.dtypes(self._like(int(values)).dtype)
        first, stop = self._span() or (0, 0)
        return self._like().shape[0] * ((stop - first) * coefficients.itemsize + width * bases.itemsize)

    def _token_nbytes(self) -> int:
        assert self.tail is not None
        return sum(tail.buffer[:, :, :1].nbytes for tail in self.tail)

    def _span(self) -> tuple[int, int] | None:
        """The tokens of the tail that a first fit takes."""
        if self.tail is None:
            return None
        stop = self.tail[0].tokens - self.settings.keep_recent
        skip = self.settings.keep_first if self.first is None else 0
        return (skip, stop) if stop - skip >= self.settings.block else None

    def _compress(self) -> None:
        assert self.tail is not None
        count = self.tail[0].tokens - self.settings.keep_recent
        if self.old is None:
            if not self.waits:
                self._begin()
        elif count >= self.settings.block:
            limits = self._limits()
            for latent, x, limit in zip(self.old, self._leaving(0, count), limits, strict=True):
                latent.extend(x, limit)
            self._drop(count)

    def _begin(self) -> None:
        """The first fit."""
        span = self._span()
        if span is None:
            return
        assert self.tail is not None
        skip, count = span
        subspaces = (None, None) if self.subspaces is None else self.subspaces
        ranks = (None, None) if self.ranks is None else self.ranks
        made = [
            fit_latent(x, self.settings, self._like(index).dtype, given, own, values=index == 1)
            for index, (x, given, own) in enumerate(zip(self._leaving(*span), subspaces, ranks, strict=True))
        ]
        if skip:
            first, second = (tail.read()[:, :, :skip].clone() for tail in self.tail)
            self.first = first, second
        self.old = made[0], made[1]
        self._drop(count)

    def _leaving(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens of the tail, the rotation taken off the keys, in fp32."""
        assert self.tail is not None
        keys, values = (tail.read()[:, :, start:stop].float() for tail in self.tail)
        if self.rotation is not None:
            index = self._before_tail() + start
            keys = self.rotation.turn(keys, -torch.arange(index, index + stop - start, device=keys.device))
        return keys, values

    def _drop(self, count: int) -> None:
        assert self.tail is not None
        for tail in self.tail:
            tail.drop(count)

    def _limits(self) -> list[float | None]:
        assert self.old is not None
        factor = self.settings.refresh
        # looking at the error waits for the device, and breaks a compiled graph
        if factor is None or torch.compiler.is_compiling():
            return [None, None]
        return [factor * latent.discarded + 1e-4 for latent in self.old]

    def _first_tokens(self) -> int:
        return 0 if self.first is None else self.first[0].shape[2]

    def _before_tail(self) -> int:
        return self._first_tokens() + self.compressed

    def _like(self, side: int = 0) -> Tensor:
        assert self.tail is not None
        return self.tail[side].buffer

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.tail is None:
            return
        if self.first is not None:
            keys, values = map(change, self.first)
            self.first = keys, values
        for latent in self.old or ():
            latent.over_batch(change)
        for tail in self.tail:
            tail.over_batch(change)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise LowRankError(
                f"LowRankKV: got keys {tuple(keys.shape)} and values {tuple(values.shape)}, expected"
                " [batch, heads, tokens, size] with the same batch, heads and tokens."
            )
        if keys.shape[2] == 0:
            raise LowRankError(
                "LowRankKV: got keys of no tokens, expected at least one; give a prompt that is not empty."
            )
        floating = keys.is_floating_point() and values.is_floating_point()
        if not floating or keys.device != values.device:
            raise LowRankError(
                f"LowRankKV: got keys in {keys.dtype} on {keys.device} and values in {values.dtype} on {values.device},"
                " expected floating point on one device."
            )
        for rank, x, what in (
            (self.settings.rank, keys, "keys"),
            (self.settings.rank_of(values=True), values, "values"),
        ):
            if isinstance(rank, int) and rank > x.shape[3]:
                raise LowRankError(
                    f"LowRankKV: got rank {rank} for {what} of {x.shape[3]} entries a head, expected at most that many."
                )
        if self.tail is not None:
            for tail, x, what in zip(self.tail, (keys, values), ("keys", "values"), strict=True):
                known = tail.buffer
                same = known.shape[:2] == x.shape[:2] and known.shape[3] == x.shape[3]
                if not same or known.dtype != x.dtype or known.device != x.device:
                    raise LowRankError(
                        f"LowRankKV: got {what} {_described(x)}, but the cache holds {_described(known)}; a cache"
                        " belongs to one model, batch, dtype and device: make a new one."
                    )
        limit = self.settings.max_length
        if limit is not None and len(self) + keys.shape[2] > limit:
            raise LowRankError(
                f"LowRankKV: got {keys.shape[2]} more tokens after {len(self)}, expected at most max_length={limit}."
            )
        if not torch.compiler.is_compiling() and not _are_finite(keys, values):
            raise LowRankError("LowRankKV: got keys or values with NaN or Inf; look at the model's input and dtype.")


def _are_finite(*tensors: Tensor) -> bool:
    """By their extremes, which NaN passes through; a sum of finite numbers may be none itself."""
    ends = [end.isfinite() for tensor in tensors if tensor.numel() for end in tensor.detach().aminmax()]
    return not ends or bool(torch.stack(ends).all())


def _described(x: Tensor) -> str:
    return f"[{x.shape[0]}, {x.shape[1]}, tokens, {x.shape[3]}] in {x.dtype} on {x.device}"
