"""Evaluation: what a model costs and how good it is, alone or beside another."""

from .compare import Comparison as Comparison, compare as compare
from .evaluate import Evaluation as Evaluation, evaluate as evaluate
from .latency import Latency as Latency
