"""Makes the big matrices of a PyTorch network low-rank wherever they live."""

from .calibrate import Calibration, SampledCrossEntropy, calibrate
from .checkpoint import load, save
from .compress import (
    METHODS,
    Budget,
    CPMethod,
    Entry,
    Method,
    Option,
    Plan,
    SVDMethod,
    TuckerMethod,
    densify_,
    factorize_,
    make_plan,
)
from .cost import Cost
from .decompose import cp, svd, tucker
from .errors import BudgetError, CheckpointError, LowRankError, MissingExtraError, UnsupportedLayerError
from .factors import CP, SVD, Factorization, Tucker
from .layers import (
    CPConv2d,
    FactoredModule,
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    TuckerConv2d,
    layer_cost,
)
from .moments import LayerStats, Statistics
from .rank import (
    EVBMF,
    Elbow,
    Energy,
    GavishDonoho,
    ParameterFraction,
    Rank,
    RankRule,
    RelativeError,
    Spectrum,
)

__version__ = "0.1.0"

__all__ = [
    "CP",
    "EVBMF",
    "METHODS",
    "SVD",
    "Budget",
    "BudgetError",
    "CPConv2d",
    "CPMethod",
    "Calibration",
    "CheckpointError",
    "Cost",
    "Elbow",
    "Energy",
    "Entry",
    "FactoredModule",
    "Factorization",
    "GavishDonoho",
    "LayerStats",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankError",
    "LowRankLinear",
    "Method",
    "MissingExtraError",
    "Option",
    "ParameterFraction",
    "Plan",
    "Rank",
    "RankRule",
    "RelativeError",
    "SVDMethod",
    "SampledCrossEntropy",
    "Spectrum",
    "Statistics",
    "Tucker",
    "TuckerConv2d",
    "TuckerMethod",
    "UnsupportedLayerError",
    "calibrate",
    "cp",
    "densify_",
    "factorize_",
    "layer_cost",
    "load",
    "make_plan",
    "save",
    "svd",
    "tucker",
]
