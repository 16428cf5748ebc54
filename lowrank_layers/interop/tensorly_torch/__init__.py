"""Conversion of layers from and to tensorly-torch, with equal outputs. Needs the extra ``tensorly``."""

from .from_tltorch import from_tltorch as from_tltorch
from .to_tltorch import to_tltorch as to_tltorch
