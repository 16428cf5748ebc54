"""Low-rank key/value caches: in plain torch here, for transformers in ``transformers/``."""

from typing import TYPE_CHECKING

from ..errors import MissingExtraError
from .budget import compress_together as compress_together
from .calibrated_subspaces import kv_subspaces as kv_subspaces
from .kv_transforms import KVTransforms as KVTransforms
from .low_rank_attention import LowRankAttention as LowRankAttention
from .low_rank_kv import LowRankKV as LowRankKV
from .rope import Rotation as Rotation
from .settings import KVSettings as KVSettings
from .subspace import Subspace as Subspace
from .transformers.calibrate_kv import calibrate_kv as calibrate_kv
from .transformers.factorize_kv import factorize_kv_ as factorize_kv_
from .transformers.latent_attention import LatentAttention as LatentAttention, LatentProjection as LatentProjection
from .transformers.mla import absorb_mla_ as absorb_mla_

if TYPE_CHECKING:
    from .transformers.cache import LowRankCache as LowRankCache
else:

    def __getattr__(name: str) -> object:
        if name != "LowRankCache":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import transformers  # noqa: F401 - only to tell its absence from other errors
        except ImportError as error:
            raise MissingExtraError(
                'LowRankCache needs transformers: pip install "lowrank-layers[transformers]".'
            ) from error
        from .transformers.cache import LowRankCache

        return LowRankCache
