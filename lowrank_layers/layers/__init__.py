"""Drop-in ``nn.Module``s whose weight is stored in factors. Their children are ordinary torch modules."""

from .attention import PROJECTIONS, LowRankMultiheadAttention
from .base import FACTORED_LAYERS, FactoredModule, bias_of, is_derived, is_factored, meta_twin, weight_of
from .cost import layer_cost, layer_writes
from .cp_conv import CPConv, CPConv1d, CPConv2d, CPConv3d, CPConvTranspose1d, CPConvTranspose2d, CPConvTranspose3d
from .embedding import LowRankEmbedding
from .embedding_bag import LowRankEmbeddingBag
from .kernel import ConvNd
from .linear import LowRankLinear, LowRankTransposedLinear
from .low_rank_conv import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    PairConv,
)
from .matrix import is_embedding, is_transposed, linear_shape, matrices_of, takes_bias, weight_from_matrices
from .plain import peculiarity
from .tt_embedding import TensorizedEmbedding
from .tucker_conv import (
    TuckerConv,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose1d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
)

__all__ = [
    "FACTORED_LAYERS",
    "PROJECTIONS",
    "CPConv",
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "CPConvTranspose1d",
    "CPConvTranspose2d",
    "CPConvTranspose3d",
    "ConvNd",
    "FactoredModule",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankTransposedLinear",
    "PairConv",
    "TensorizedEmbedding",
    "TuckerConv",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerConvTranspose1d",
    "TuckerConvTranspose2d",
    "TuckerConvTranspose3d",
    "bias_of",
    "is_derived",
    "is_embedding",
    "is_factored",
    "is_transposed",
    "layer_cost",
    "layer_writes",
    "linear_shape",
    "matrices_of",
    "meta_twin",
    "peculiarity",
    "takes_bias",
    "weight_from_matrices",
    "weight_of",
]
