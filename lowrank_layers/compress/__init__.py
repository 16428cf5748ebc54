"""A trained model, to a budget: methods, allocation, plan, factorization."""

from .candidates import Candidate as Candidate
from .cost_model import CostModel as CostModel, CountedCost as CountedCost
from .damping import Damping as Damping
from .densify import densify_ as densify_
from .entry import Entry as Entry
from .factorize import factorize_ as factorize_
from .make_plan import make_plan as make_plan
from .methods import (
    METHODS as METHODS,
    CPMethod as CPMethod,
    Method as Method,
    Option as Option,
    SpatialMethod as SpatialMethod,
    SVDMethod as SVDMethod,
    TensorizedMethod as TensorizedMethod,
    TuckerMethod as TuckerMethod,
    register_method as register_method,
)
from .plan import Plan as Plan
