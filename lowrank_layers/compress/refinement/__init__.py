"""Refinement: training a compressed model stage by stage, to give what the stages of the dense model give."""

from .refine import refine_ as refine_
from .result import RefinedStage as RefinedStage, Refinement as Refinement
from .settings import RefinementSettings as RefinementSettings
