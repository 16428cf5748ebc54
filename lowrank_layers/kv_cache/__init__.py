"""Key/value caches at low rank: the core in plain torch, and transformers' interface."""

from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from .budget import compress_together
from .calibrated_subspaces import kv_subspaces
from .low_rank_attention import LowRankAttention
from .low_rank_kv import LowRankKV
from .rope import Rotation
from .settings import KVSettings
from .subspace import Subspace
from .transformers.factorize_kv import factorize_kv_
from .transformers.latent_attention import LatentAttention, LatentProjection
from .transformers.mla import absorb_mla_

if TYPE_CHECKING:
    from .transformers.cache import LowRankCache

__all__ = [
    "KVSettings",
    "LatentAttention",
    "LatentProjection",
    "LowRankAttention",
    "LowRankCache",
    "LowRankKV",
    "Rotation",
    "Subspace",
    "absorb_mla_",
    "compress_together",
    "factorize_kv_",
    "kv_subspaces",
]


def __getattr__(name: str) -> Any:
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
