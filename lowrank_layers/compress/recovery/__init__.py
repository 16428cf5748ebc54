"""Recovery: training a compressed model by labels or by a teacher."""

from .distillation import Distillation as Distillation
from .recover import recover_ as recover_
from .result import Recovery as Recovery
from .settings import RecoverySettings as RecoverySettings
