"""Rank rules: a spectrum (or the sizes of the candidates) in, a rank out. Usable wherever ``rank=`` is taken."""

from .elbow import Elbow
from .energy import Energy, RelativeError
from .evbmf import EVBMF
from .gavish_donoho import GavishDonoho
from .rule import Rank, RankRule, Spectrum, check_rank, choose_rank
from .size import ParameterFraction

__all__ = [
    "EVBMF",
    "Elbow",
    "Energy",
    "GavishDonoho",
    "ParameterFraction",
    "Rank",
    "RankRule",
    "RelativeError",
    "Spectrum",
    "check_rank",
    "choose_rank",
]
