"""The compiled functions in ``kernels/``, with the types of their arguments."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from .compiled import compiled

SOURCES = Path(__file__).with_name("kernels")


@functools.cache
def compiled_functions() -> ctypes.CDLL | None:
    """The functions, as :func:`~lowrank_layers.kv_cache.compiled.compiled` gives them."""
    found = compiled(SOURCES)
    if found is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        found.tile_scores.argtypes = [pointer] * 10 + [integer] * 11
        found.mixed.argtypes = [pointer] * 7 + [integer] * 10
        found.attention.argtypes = [pointer] * 4 + [ctypes.c_float]
        found.append_token.argtypes = [pointer] * 4 + [integer] * 5
        found.append_token.restype = integer
        found.encode.argtypes = [pointer] * 4 + [integer] * 7
        found.compress_tokens.argtypes = [pointer] * 14 + [integer] * 17
        found.second_moment.argtypes = [pointer] * 2 + [integer] * 5
        found.second_moment.restype = integer
    return found
