"""Rank rules, which choose the rank of one matrix from its spectrum, and budgets, which choose those of many layers.

Each rule stands in a file of its own, from which ``lowrank_layers`` imports it.
"""

from .budget import Budget as Budget, amount as amount, as_budget as as_budget, one_limit as one_limit
from .knapsack import allocate as allocate
from .refit import Refit as Refit
from .rule import (
    Rank as Rank,
    RankRule as RankRule,
    Spectrum as Spectrum,
    WithoutValues as WithoutValues,
    check_rank as check_rank,
    choose_rank as choose_rank,
    pair_spectrum as pair_spectrum,
)
from .several_limits import allocate_within as allocate_within
