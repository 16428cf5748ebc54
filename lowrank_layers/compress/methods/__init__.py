"""One file a method. To add one: write the file, add it to ``METHODS``, add its row to tests/contracts."""

from .base import Method as Method, Option as Option, factored_like as factored_like, layer_for as layer_for
from .cp import CPMethod as CPMethod
from .regression import Regression as Regression, regressions as regressions
from .spatial import SpatialMethod as SpatialMethod
from .svd import SVDMethod as SVDMethod
from .tensorized import TensorizedMethod as TensorizedMethod
from .tucker import TuckerMethod as TuckerMethod

METHODS: dict[str, Method] = {
    method.name: method for method in (SVDMethod(), SpatialMethod(), TuckerMethod(), CPMethod(), TensorizedMethod())
}
"""Every method by the name that plans and files use."""
