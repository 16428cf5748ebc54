"""Low-rank factorization for PyTorch: layers, compression to a budget, LoRA, key/value caches and gradients.

A public name stands here once, as ``from .x import A as A``: the form that type checkers, editors and ruff read as a
re-export. ``__all__`` is what these lines have imported.
"""

import types
import typing

import torch.distributed

from . import interop, kv_cache
from .calibrate import (
    Calibration as Calibration,
    LeaveOut as LeaveOut,
    SampledCrossEntropy as SampledCrossEntropy,
    calibrate as calibrate,
)
from .calibrate.statistics import LayerStats as LayerStats, Statistics as Statistics
from .checkpoint import compress_checkpoint as compress_checkpoint, load as load, save as save
from .compress import (
    METHODS as METHODS,
    Candidate as Candidate,
    Comparison as Comparison,
    CostModel as CostModel,
    CountedCost as CountedCost,
    Damping as Damping,
    Distillation as Distillation,
    Entry as Entry,
    Evaluation as Evaluation,
    GroupMethod as GroupMethod,
    Latency as Latency,
    LayerGroup as LayerGroup,
    Method as Method,
    Option as Option,
    Plan as Plan,
    Progression as Progression,
    Recovery as Recovery,
    RecoverySettings as RecoverySettings,
    RefinedStage as RefinedStage,
    Refinement as Refinement,
    RefinementSettings as RefinementSettings,
    Stage as Stage,
    compare as compare,
    densify_ as densify_,
    evaluate as evaluate,
    factorize_ as factorize_,
    make_plan as make_plan,
    plan_by_validation as plan_by_validation,
    progressive_ as progressive_,
    recover_ as recover_,
    reduce_head_dim_ as reduce_head_dim_,
    refine_ as refine_,
    register_method as register_method,
    remove_units_ as remove_units_,
)
from .compress.methods import (
    AttentionHeadsMethod as AttentionHeadsMethod,
    CPMethod as CPMethod,
    HiddenUnitsMethod as HiddenUnitsMethod,
    PivotMethod as PivotMethod,
    SpatialMethod as SpatialMethod,
    SVDMethod as SVDMethod,
    TensorizedLinearMethod as TensorizedLinearMethod,
    TensorizedMethod as TensorizedMethod,
    TuckerMethod as TuckerMethod,
)
from .cost import Cost as Cost
from .decompose import cp as cp, nmf as nmf, svd as svd, tucker as tucker
from .errors import (
    BudgetError as BudgetError,
    CheckpointError as CheckpointError,
    LowRankError as LowRankError,
    MissingExtraError as MissingExtraError,
    UnsupportedLayerError as UnsupportedLayerError,
)
from .factors import (
    CP as CP,
    NMF as NMF,
    SVD as SVD,
    Blocks as Blocks,
    BlockTT as BlockTT,
    Factorization as Factorization,
    Tucker as Tucker,
)
from .kv_cache import (
    KVSettings as KVSettings,
    KVTransforms as KVTransforms,
    LowRankAttention as LowRankAttention,
    LowRankKV as LowRankKV,
    Rotation as Rotation,
    absorb_mla_ as absorb_mla_,
    calibrate_kv as calibrate_kv,
    compress_together as compress_together,
    factorize_kv_ as factorize_kv_,
    kv_subspaces as kv_subspaces,
)
from .layers import (
    CPConv1d as CPConv1d,
    CPConv2d as CPConv2d,
    CPConv3d as CPConv3d,
    CPConvTranspose1d as CPConvTranspose1d,
    CPConvTranspose2d as CPConvTranspose2d,
    CPConvTranspose3d as CPConvTranspose3d,
    FactoredModule as FactoredModule,
    Int8Embedding as Int8Embedding,
    Int8Linear as Int8Linear,
    LowRankConv1d as LowRankConv1d,
    LowRankConv2d as LowRankConv2d,
    LowRankConv3d as LowRankConv3d,
    LowRankConvTranspose1d as LowRankConvTranspose1d,
    LowRankConvTranspose2d as LowRankConvTranspose2d,
    LowRankConvTranspose3d as LowRankConvTranspose3d,
    LowRankEmbedding as LowRankEmbedding,
    LowRankEmbeddingBag as LowRankEmbeddingBag,
    LowRankLinear as LowRankLinear,
    LowRankMultiheadAttention as LowRankMultiheadAttention,
    LowRankTransposedLinear as LowRankTransposedLinear,
    PivotConv1d as PivotConv1d,
    PivotConv2d as PivotConv2d,
    PivotConv3d as PivotConv3d,
    PivotLinear as PivotLinear,
    PivotTransposedLinear as PivotTransposedLinear,
    TensorizedEmbedding as TensorizedEmbedding,
    TensorizedLinear as TensorizedLinear,
    TuckerConv1d as TuckerConv1d,
    TuckerConv2d as TuckerConv2d,
    TuckerConv3d as TuckerConv3d,
    TuckerConvTranspose1d as TuckerConvTranspose1d,
    TuckerConvTranspose2d as TuckerConvTranspose2d,
    TuckerConvTranspose3d as TuckerConvTranspose3d,
    layer_cost as layer_cost,
)
from .lora import (
    Extraction as Extraction,
    LoraRankAllocator as LoraRankAllocator,
    add_lora_ as add_lora_,
    combine_lora_ as combine_lora_,
    extract_lora as extract_lora,
    load_lora as load_lora,
    loftq_ as loftq_,
    lora_checkpoints as lora_checkpoints,
    lora_disabled as lora_disabled,
    lora_parameters as lora_parameters,
    lora_rows as lora_rows,
    merge_lora_ as merge_lora_,
    remove_lora_ as remove_lora_,
    save_lora as save_lora,
    swap_lora_ as swap_lora_,
    unmerge_lora_ as unmerge_lora_,
    use_adapter as use_adapter,
    weight_gradients as weight_gradients,
)
from .lora.inits.base import InitContext as InitContext, LoRAFactors as LoRAFactors, LoRAInit as LoRAInit
from .lora.inits.corda import CorDA as CorDA
from .lora.inits.eva import EVA as EVA
from .lora.inits.loftq import LoftQ as LoftQ
from .lora.inits.lora_ga import LoRAGA as LoRAGA
from .optim import SOAP as SOAP, LowRankProjection as LowRankProjection
from .rank import Budget as Budget, Rank as Rank, RankRule as RankRule, Refit as Refit, Spectrum as Spectrum
from .rank.consensus import (
    ConsensusStability as ConsensusStability,
    consensus_matrix as consensus_matrix,
    cophenetic_correlation as cophenetic_correlation,
    dispersion as dispersion,
)
from .rank.corcondia import CORCONDIA as CORCONDIA, core_consistency as core_consistency
from .rank.cross_validation import CrossValidation as CrossValidation
from .rank.device import Device as Device
from .rank.effective_rank import EffectiveRank as EffectiveRank
from .rank.elbow import Elbow as Elbow
from .rank.energy import Energy as Energy, RelativeError as RelativeError
from .rank.evbmf import EVBMF as EVBMF
from .rank.factor_match import FactorMatch as FactorMatch, factor_match_score as factor_match_score
from .rank.gavish_donoho import GavishDonoho as GavishDonoho
from .rank.rank_fraction import RankFraction as RankFraction
from .rank.residual_whiteness import ResidualWhiteness as ResidualWhiteness
from .rank.size import ParameterFraction as ParameterFraction
from .rank.stable_rank import StableRank as StableRank
from .spectrum import (
    ActivationLayer as ActivationLayer,
    ActivationSpectrum as ActivationSpectrum,
    Advice as Advice,
    Capacity as Capacity,
    CheckpointRecorder as CheckpointRecorder,
    Forecast as Forecast,
    LayerCapacity as LayerCapacity,
    LayerSpectrum as LayerSpectrum,
    LeadingSpectrum as LeadingSpectrum,
    MatrixSpectrum as MatrixSpectrum,
    PowerLaw as PowerLaw,
    ResidualReport as ResidualReport,
    SpectrumMonitor as SpectrumMonitor,
    SpectrumRecord as SpectrumRecord,
    TrajectorySpectrum as TrajectorySpectrum,
    WeightSpectrum as WeightSpectrum,
    activation_spectrum as activation_spectrum,
    capacity as capacity,
    fit_power_law as fit_power_law,
    forecast as forecast,
    read_spectra as read_spectra,
    residual_report as residual_report,
    should_factorize as should_factorize,
    trajectory_spectrum as trajectory_spectrum,
    weight_spectrum as weight_spectrum,
)

if torch.distributed.is_available():  # torch may be built without it
    from .distributed import (
        LowRankCommState as LowRankCommState,
        LowRankReduceState as LowRankReduceState,
        PowerSGDSettings as PowerSGDSettings,
        attach_low_rank_reduce as attach_low_rank_reduce,
        low_rank_hook as low_rank_hook,
        merge_comm_states as merge_comm_states,
    )

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from .interop.transformers import LowRankConfig as LowRankConfig
    from .kv_cache import LowRankCache as LowRankCache
else:
    __all__ = ["LowRankCache", "LowRankConfig"]
    __all__ += [key for key, value in globals().items() if key[0] != "_" and not isinstance(value, types.ModuleType)]
    __all__.sort()

    def __getattr__(name: str) -> object:
        # these two need transformers, which importing this library must not
        if name == "LowRankCache":
            return kv_cache.LowRankCache
        if name == "LowRankConfig":
            return interop.transformers.LowRankConfig
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__
