"""The import of tensorly-torch, an optional dependency, and the convolutions that both libraries have."""

from __future__ import annotations

from typing import Any

from ...errors import MissingExtraError
from ...layers import CPConv, CPConv1d, CPConv2d, CPConv3d, TuckerConv, TuckerConv1d, TuckerConv2d, TuckerConv3d

CP_CONVS: dict[int, type[CPConv]] = {1: CPConv1d, 2: CPConv2d, 3: CPConv3d}
TUCKER_CONVS: dict[int, type[TuckerConv]] = {1: TuckerConv1d, 2: TuckerConv2d, 3: TuckerConv3d}


def import_tltorch() -> Any:
    """Returns the module ``tltorch``, or raises an error that names the extra to install."""
    try:
        import tltorch
    except ImportError:
        raise MissingExtraError(
            "converting tensorly-torch's layers needs tensorly-torch; install lowrank-layers[tensorly]."
        ) from None
    return tltorch
