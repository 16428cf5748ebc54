"""transformers' cache interface around :class:`LowRankKV`. Needs transformers, the extra ``transformers``."""

from .cache import LowRankCache

__all__ = ["LowRankCache"]
