"""Progressive decomposition: factorizing and recovery by turns, down to the smallest model that is good enough."""

from .progressive import progressive_ as progressive_
from .result import Progression as Progression, Stage as Stage
