"""Optimizers: GaLore's projection of gradients around any torch optimizer, and SOAP for factors."""

from .low_rank_projection import LowRankProjection as LowRankProjection
from .soap import SOAP as SOAP
