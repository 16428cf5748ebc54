"""Makes the big matrices of a PyTorch network low-rank wherever they live."""

import importlib
from typing import TYPE_CHECKING, Any

from . import kv_cache
from .calibrate import Calibration, SampledCrossEntropy, calibrate
from .calibrate.statistics import LayerStats, Statistics
from .checkpoint import load, save
from .compress import (
    METHODS,
    CPMethod,
    Entry,
    Method,
    Option,
    Plan,
    SpatialMethod,
    SVDMethod,
    TensorizedMethod,
    TuckerMethod,
    densify_,
    factorize_,
    make_plan,
)
from .cost import Cost
from .decompose import cp, nmf, svd, tucker
from .errors import BudgetError, CheckpointError, LowRankError, MissingExtraError, UnsupportedLayerError
from .factors import CP, NMF, SVD, Blocks, BlockTT, Factorization, Tucker
from .kv_cache import (
    KVSettings,
    LowRankAttention,
    LowRankKV,
    Rotation,
    absorb_mla_,
    compress_together,
    factorize_kv_,
    kv_subspaces,
)
from .layers import (
    CPConv1d,
    CPConv2d,
    CPConv3d,
    CPConvTranspose1d,
    CPConvTranspose2d,
    CPConvTranspose3d,
    FactoredModule,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    LowRankLinear,
    LowRankMultiheadAttention,
    LowRankTransposedLinear,
    TensorizedEmbedding,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose1d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
    layer_cost,
)
from .lora import (
    Extraction,
    LoraRankAllocator,
    add_lora_,
    combine_lora_,
    extract_lora,
    load_lora,
    loftq_,
    lora_disabled,
    lora_parameters,
    lora_rows,
    merge_lora_,
    remove_lora_,
    save_lora,
    swap_lora_,
    unmerge_lora_,
    use_adapter,
    weight_gradients,
)
from .rank import (
    EVBMF,
    Budget,
    Elbow,
    Energy,
    GavishDonoho,
    ParameterFraction,
    Rank,
    RankRule,
    RelativeError,
    Spectrum,
)

if TYPE_CHECKING:
    from .distributed import (
        LowRankCommState,
        LowRankReduceState,
        attach_low_rank_reduce,
        low_rank_hook,
        merge_comm_states,
    )
    from .kv_cache import LowRankCache
    from .optim import LowRankProjection

__version__ = "0.1.0"

__all__ = [
    "CP",
    "EVBMF",
    "METHODS",
    "NMF",
    "SVD",
    "BlockTT",
    "Blocks",
    "Budget",
    "BudgetError",
    "CPConv1d",
    "CPConv2d",
    "CPConv3d",
    "CPConvTranspose1d",
    "CPConvTranspose2d",
    "CPConvTranspose3d",
    "CPMethod",
    "Calibration",
    "CheckpointError",
    "Cost",
    "Elbow",
    "Energy",
    "Entry",
    "Extraction",
    "FactoredModule",
    "Factorization",
    "GavishDonoho",
    "KVSettings",
    "LayerStats",
    "LoraRankAllocator",
    "LowRankAttention",
    "LowRankCache",
    "LowRankCommState",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankError",
    "LowRankKV",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankProjection",
    "LowRankReduceState",
    "LowRankTransposedLinear",
    "Method",
    "MissingExtraError",
    "Option",
    "ParameterFraction",
    "Plan",
    "Rank",
    "RankRule",
    "RelativeError",
    "Rotation",
    "SVDMethod",
    "SampledCrossEntropy",
    "SpatialMethod",
    "Spectrum",
    "Statistics",
    "TensorizedEmbedding",
    "TensorizedMethod",
    "Tucker",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerConvTranspose1d",
    "TuckerConvTranspose2d",
    "TuckerConvTranspose3d",
    "TuckerMethod",
    "UnsupportedLayerError",
    "absorb_mla_",
    "add_lora_",
    "attach_low_rank_reduce",
    "calibrate",
    "combine_lora_",
    "compress_together",
    "cp",
    "densify_",
    "extract_lora",
    "factorize_",
    "factorize_kv_",
    "kv_subspaces",
    "layer_cost",
    "load",
    "load_lora",
    "loftq_",
    "lora_disabled",
    "lora_parameters",
    "lora_rows",
    "low_rank_hook",
    "make_plan",
    "merge_comm_states",
    "merge_lora_",
    "nmf",
    "remove_lora_",
    "save",
    "save_lora",
    "svd",
    "swap_lora_",
    "tucker",
    "unmerge_lora_",
    "use_adapter",
    "weight_gradients",
]


_DISTRIBUTED = (
    "LowRankCommState",
    "LowRankReduceState",
    "attach_low_rank_reduce",
    "low_rank_hook",
    "merge_comm_states",
)


def __getattr__(name: str) -> Any:
    # it needs transformers, which importing this library must not
    if name == "LowRankCache":
        return kv_cache.LowRankCache
    # few programs train in several processes, and all of them pay for an import
    if name in _DISTRIBUTED:
        return getattr(importlib.import_module(".distributed", __name__), name)
    if name == "LowRankProjection":
        return getattr(importlib.import_module(".optim", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
