"""Optimizers with a low-rank state: GaLore's projection of gradients around any torch optimizer."""

from .low_rank_projection import LowRankProjection as LowRankProjection
