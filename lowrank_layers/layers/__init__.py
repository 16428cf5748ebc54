"""Drop-in replacements of torch's layers whose weight is stored in factors, held by ordinary torch modules."""

from .attention import LowRankMultiheadAttention as LowRankMultiheadAttention
from .base import (
    FACTORED_LAYERS as FACTORED_LAYERS,
    FactoredModule as FactoredModule,
    is_derived as is_derived,
    is_factored as is_factored,
)
from .cost import (
    buffer_bytes as buffer_bytes,
    codes as codes,
    layer_cost as layer_cost,
    layer_writes as layer_writes,
)
from .cp_conv import (
    CPConv as CPConv,
    CPConv1d as CPConv1d,
    CPConv2d as CPConv2d,
    CPConv3d as CPConv3d,
    CPConvTranspose1d as CPConvTranspose1d,
    CPConvTranspose2d as CPConvTranspose2d,
    CPConvTranspose3d as CPConvTranspose3d,
)
from .embedding import LowRankEmbedding as LowRankEmbedding
from .embedding_bag import LowRankEmbeddingBag as LowRankEmbeddingBag
from .instance_checks import peculiarity as peculiarity
from .int8 import (
    INT8_LAYERS as INT8_LAYERS,
    bits_of as bits_of,
    int8_for as int8_for,
    is_compressed as is_compressed,
    is_int8 as is_int8,
    round_factors_ as round_factors_,
)
from .int8_embedding import Int8Embedding as Int8Embedding
from .int8_layer import Int8Layer as Int8Layer
from .int8_linear import Int8Linear as Int8Linear
from .kernel import ConvNd as ConvNd
from .linear import LowRankLinear as LowRankLinear
from .low_rank_conv import (
    LowRankConv1d as LowRankConv1d,
    LowRankConv2d as LowRankConv2d,
    LowRankConv3d as LowRankConv3d,
    LowRankConvTranspose1d as LowRankConvTranspose1d,
    LowRankConvTranspose2d as LowRankConvTranspose2d,
    LowRankConvTranspose3d as LowRankConvTranspose3d,
)
from .matrix import (
    is_embedding as is_embedding,
    is_transposed as is_transposed,
    linear_shape as linear_shape,
    matrices_of as matrices_of,
    takes_bias as takes_bias,
    weight_from_matrices as weight_from_matrices,
)
from .pair_conv import PairConv as PairConv
from .pivot_conv import (
    PivotConv as PivotConv,
    PivotConv1d as PivotConv1d,
    PivotConv2d as PivotConv2d,
    PivotConv3d as PivotConv3d,
)
from .pivot_linear import PivotLinear as PivotLinear
from .pivot_transposed_linear import PivotTransposedLinear as PivotTransposedLinear
from .resized import is_resized as is_resized, mark_resized as mark_resized, unmark_resized as unmark_resized
from .transposed_linear import LowRankTransposedLinear as LowRankTransposedLinear
from .tt_embedding import TensorizedEmbedding as TensorizedEmbedding
from .tt_linear import TensorizedLinear as TensorizedLinear
from .tucker_conv import (
    TuckerConv as TuckerConv,
    TuckerConv1d as TuckerConv1d,
    TuckerConv2d as TuckerConv2d,
    TuckerConv3d as TuckerConv3d,
    TuckerConvTranspose1d as TuckerConvTranspose1d,
    TuckerConvTranspose2d as TuckerConvTranspose2d,
    TuckerConvTranspose3d as TuckerConvTranspose3d,
)
from .unfused_attention import PROJECTIONS as PROJECTIONS
from .weights import bias_of as bias_of, meta_twin as meta_twin, weight_of as weight_of
