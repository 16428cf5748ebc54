"""Optimizers at low rank: GaLore's projection of gradients around any of them."""

from .low_rank_projection import LowRankProjection as LowRankProjection
