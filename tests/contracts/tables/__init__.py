"""One row per layer, decomposition and rank rule: a new one is one line in one file here, and inherits every check.

Tests ask the rows, never the classes: what differs between layers is said in the tables.
"""

from .common import (
    BAD_RANKS as BAD_RANKS,
    DERANDOMIZED as DERANDOMIZED,
    HALF_TOLERANCE as HALF_TOLERANCE,
    HALVES as HALVES,
    generator as generator,
    relative as relative,
)
from .decompositions import DECOMPOSITIONS as DECOMPOSITIONS, SVD_METHODS as SVD_METHODS
from .layers import LAYERS as LAYERS, LayerRow as LayerRow
from .rules import REFIT_RULES as REFIT_RULES, RULES as RULES, spectrum as spectrum, spectrum_of as spectrum_of
