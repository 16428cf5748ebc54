"""Ranks: rules for one matrix (a spectrum or the sizes of the candidates in, a rank out), a budget for many."""

from .budget import Budget, as_budget
from .elbow import Elbow
from .energy import Energy, RelativeError
from .evbmf import EVBMF
from .gavish_donoho import GavishDonoho
from .knapsack import allocate
from .rule import Rank, RankRule, Spectrum, check_rank, choose_rank, pair_spectrum
from .size import ParameterFraction

__all__ = [
    "EVBMF",
    "Budget",
    "Elbow",
    "Energy",
    "GavishDonoho",
    "ParameterFraction",
    "Rank",
    "RankRule",
    "RelativeError",
    "Spectrum",
    "allocate",
    "as_budget",
    "check_rank",
    "choose_rank",
    "pair_spectrum",
]
