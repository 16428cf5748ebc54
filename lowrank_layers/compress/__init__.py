"""A trained model, to a budget: methods, allocation, plan, factorization."""

from .entry import Entry
from .factorize import densify_, factorize_
from .make_plan import make_plan
from .methods import (
    METHODS,
    CPMethod,
    Method,
    Option,
    SpatialMethod,
    SVDMethod,
    TensorizedMethod,
    TuckerMethod,
)
from .plan import Plan

__all__ = [
    "METHODS",
    "CPMethod",
    "Entry",
    "Method",
    "Option",
    "Plan",
    "SVDMethod",
    "SpatialMethod",
    "TensorizedMethod",
    "TuckerMethod",
    "densify_",
    "factorize_",
    "make_plan",
]
