"""One file a method. To add one: write the file, add it to ``METHODS``, add its row to tests/contracts."""

from .base import Method, Option, factored_like, layer_for
from .cp import CPMethod
from .regression import Regression, regressions
from .spatial import SpatialMethod
from .svd import SVDMethod
from .tensorized import TensorizedMethod
from .tucker import TuckerMethod

METHODS: dict[str, Method] = {
    method.name: method for method in (SVDMethod(), SpatialMethod(), TuckerMethod(), CPMethod(), TensorizedMethod())
}
"""Every method by the name that plans and files use."""

__all__ = [
    "METHODS",
    "CPMethod",
    "Method",
    "Option",
    "Regression",
    "SVDMethod",
    "SpatialMethod",
    "TensorizedMethod",
    "TuckerMethod",
    "factored_like",
    "layer_for",
    "regressions",
]
