"""Compression of a trained model to a budget: methods, allocation, plan, factorization, recovery, evaluation."""

from . import methods as methods
from .attention_heads import reduce_head_dim_ as reduce_head_dim_
from .candidates import Candidate as Candidate
from .cost_model import CostModel as CostModel, CountedCost as CountedCost
from .damping import Damping as Damping
from .densify import densify_ as densify_
from .entry import Entry as Entry
from .evaluation import (
    Comparison as Comparison,
    Evaluation as Evaluation,
    Latency as Latency,
    compare as compare,
    evaluate as evaluate,
)
from .factorize import factorize_ as factorize_
from .group_method import GroupMethod as GroupMethod, LayerGroup as LayerGroup
from .hidden_units import remove_units_ as remove_units_
from .make_plan import make_plan as make_plan
from .method import Method as Method, Option as Option
from .plan import Plan as Plan
from .progressive import Progression as Progression, Stage as Stage, progressive_ as progressive_
from .recovery import (
    Distillation as Distillation,
    Recovery as Recovery,
    RecoverySettings as RecoverySettings,
    recover_ as recover_,
)
from .refinement import (
    RefinedStage as RefinedStage,
    Refinement as Refinement,
    RefinementSettings as RefinementSettings,
    refine_ as refine_,
)
from .registry import METHODS as METHODS, register_method as register_method
from .validation_plan import plan_by_validation as plan_by_validation
