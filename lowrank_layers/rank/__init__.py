"""Rank rules, which choose the rank of one matrix from its spectrum, and budgets, which choose those of many layers."""

from .budget import Budget as Budget, as_budget as as_budget
from .elbow import Elbow as Elbow
from .energy import Energy as Energy, RelativeError as RelativeError
from .evbmf import EVBMF as EVBMF
from .gavish_donoho import GavishDonoho as GavishDonoho
from .knapsack import allocate as allocate
from .rule import (
    Rank as Rank,
    RankRule as RankRule,
    Spectrum as Spectrum,
    check_rank as check_rank,
    choose_rank as choose_rank,
    pair_spectrum as pair_spectrum,
)
from .size import ParameterFraction as ParameterFraction
