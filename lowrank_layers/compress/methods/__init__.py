"""One file per method. To add one: write the file, register it below, add its row to tests/contracts."""

from .base import (
    Method as Method,
    Option as Option,
    factored_cost as factored_cost,
    factored_costs as factored_costs,
    factored_like as factored_like,
    layer_for as layer_for,
)
from .cp import CPMethod as CPMethod
from .registry import METHODS as METHODS, register_method as register_method
from .spatial import SpatialMethod as SpatialMethod
from .svd import SVDMethod as SVDMethod
from .tensorized import TensorizedMethod as TensorizedMethod
from .tucker import TuckerMethod as TuckerMethod

for _method in (SVDMethod(), SpatialMethod(), TuckerMethod(), CPMethod(), TensorizedMethod()):
    register_method(_method)
