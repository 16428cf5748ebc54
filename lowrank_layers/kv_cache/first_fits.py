"""How a layer's keys and values are compressed for the first time, from its settings and from what is known ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import LowRankError
from .bit_fit import BitPlan, fitted_transform, plan_bits
from .compressed_tokens import CompressedTokens
from .fit import Fit
from .leaving_tokens import LeavingTokens
from .settings import KVSettings
from .subspace import Subspace
from .tile_frame import TileFrame
from .transform import Transform

Compress = Callable[[LeavingTokens, Tensor | None, int], CompressedTokens]
Sides = tuple[Tensor, Tensor]


@dataclass
class FirstFits:
    """What decides how keys and values are compressed for the first time.

    Args:
        settings: settings of the cache.
        subspaces: subspaces of keys and of values from calibration, with a rank.
        plan: the bits of calibrated directions.
        ranks: ranks of the groups of heads of keys and of values that a budget gives.
        budgeted: the bits that a budget gives.
    """

    settings: KVSettings
    subspaces: tuple[Subspace, Subspace] | None = None
    plan: BitPlan | None = None
    ranks: tuple[list[int], list[int]] | None = None
    budgeted: BitPlan | None = None

    @classmethod
    def of(
        cls, settings: KVSettings, given: tuple[Subspace, Subspace] | tuple[Transform, Transform] | None
    ) -> FirstFits:
        """Those with what calibration gave for the layer.

        Args:
            settings: settings of the cache.
            given: transforms with bits, subspaces with a rank, or ``None``.

        Raises:
            LowRankError: for transforms with a rank, or subspaces with bits.
        """
        if given is None:
            return cls(settings)
        keys, values = given
        if isinstance(keys, Transform) and isinstance(values, Transform) and not settings.by_rank:
            return cls(settings, plan=plan_bits([(keys, values)], settings.mean_bits, shared=True)[0])
        if isinstance(keys, Subspace) and isinstance(values, Subspace) and settings.by_rank:
            return cls(settings, (keys, values))
        raise LowRankError(
            f"LowRankKV: got {type(keys).__name__}s and {'a rank' if settings.by_rank else 'bits'}, expected Transforms"
            " with bits, or Subspaces with a rank, as kv_subspaces makes them for the same settings."
        )

    def __call__(
        self, sides: tuple[LeavingTokens, LeavingTokens], frame: TileFrame | None, keep: Tensor | None
    ) -> tuple[Compress, Compress]:
        """What compresses keys, and what compresses values.

        Args:
            sides: keys and values.
            frame: the frame in which keys are stored.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        """
        if not self.settings.by_rank:
            plan = self.budgeted or self.plan
            if plan is None:
                (plan,) = plan_bits(
                    [self.transforms((sides[0].plain, sides[1].plain), frame, keep)], self.settings.mean_bits
                )
            return plan.fits(frame, self.settings.refresh, sides[0].exact.device)
        found = []
        for side, tokens in enumerate(sides):
            joint = self.together(tokens.exact) > 1
            rank = self.settings.rank_of(values=side == 1) if self.ranks is None else self.ranks[side]
            subspace = None if self.subspaces is None else self.subspaces[side]
            stored = self.settings.dtypes(tokens.exact.dtype)
            found.append(Fit(rank, joint, *stored, subspace, None if side else frame))
        return found[0], found[1]

    def transforms(self, sides: Sides, frame: TileFrame | None, keep: Tensor | None) -> tuple[Transform, Transform]:
        """The directions of keys and values, fitted to tokens.

        Args:
            sides: keys without their rotation, and values, in fp32.
            frame: the frame in which keys are stored.
            keep: which tokens count, ``[batch, tokens]``; ``None`` counts all.
        """
        data = keep, self.settings.at_first
        keys, values = sides
        return (
            fitted_transform(keys, self.together(keys), frame, *data, values=False),
            fitted_transform(values, self.together(values), None, *data, values=True),
        )

    def together(self, tokens: Tensor) -> int:
        """Number of heads that share one subspace.

        Args:
            tokens: keys or values, ``[batch, heads, tokens, size]``.
        """
        heads = tokens.shape[1]
        if self.plan is None:
            return self.settings.together(heads, tokens.shape[3])
        return heads // self.plan.transforms[0].mean.shape[1]
