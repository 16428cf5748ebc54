"""One file per method. To add one: write the file, register it below, add its row to tests/contracts."""

from ..registry import GROUP_METHODS, register_method
from .attention_heads import AttentionHeadsMethod as AttentionHeadsMethod
from .cp import CPMethod as CPMethod
from .hidden_units import HiddenUnitsMethod as HiddenUnitsMethod
from .pivot import PivotMethod as PivotMethod
from .spatial import SpatialMethod as SpatialMethod
from .svd import SVDMethod as SVDMethod
from .tensorized import TensorizedMethod as TensorizedMethod
from .tensorized_linear import TensorizedLinearMethod as TensorizedLinearMethod
from .tucker import TuckerMethod as TuckerMethod

for _method in (
    SVDMethod(),
    PivotMethod(),
    SpatialMethod(),
    TuckerMethod(),
    CPMethod(),
    TensorizedMethod(),
    TensorizedLinearMethod(),
):
    register_method(_method)
GROUP_METHODS[AttentionHeadsMethod.name] = AttentionHeadsMethod()
GROUP_METHODS[HiddenUnitsMethod.name] = HiddenUnitsMethod()
