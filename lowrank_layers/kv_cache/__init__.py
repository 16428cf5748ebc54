"""Key/value caches at low rank: the core in plain torch, and transformers' interface."""

from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from .allocate import compress_together
from .offline import kv_subspaces
from .plain import LowRankAttention
from .rotation import Rotation
from .settings import KVSettings
from .state import LowRankKV
from .subspace import Subspace

if TYPE_CHECKING:
    from .transformers import LowRankCache

__all__ = [
    "KVSettings",
    "LowRankAttention",
    "LowRankCache",
    "LowRankKV",
    "Rotation",
    "Subspace",
    "compress_together",
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
    from .transformers import LowRankCache

    return LowRankCache


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
