"""Conversion of layers and models from and to other libraries, each imported only when it is used."""

from . import transformers as transformers
from .tensorly_torch import from_tltorch as from_tltorch, to_tltorch as to_tltorch
