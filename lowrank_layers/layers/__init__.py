"""Drop-in ``nn.Module``s whose weight is stored in factors. Their children are ordinary torch modules."""

from .base import FACTORED_LAYERS, FactoredModule, bias_of, is_derived, is_factored, weight_of
from .conv import LowRankConv2d
from .count import layer_cost
from .cp import CPConv2d
from .embedding import LowRankEmbedding
from .linear import LowRankLinear
from .tucker import TuckerConv2d

__all__ = [
    "FACTORED_LAYERS",
    "CPConv2d",
    "FactoredModule",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "TuckerConv2d",
    "bias_of",
    "is_derived",
    "is_factored",
    "layer_cost",
    "weight_of",
]
