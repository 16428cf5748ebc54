"""Layers of other libraries, there and back; each file imports its library when it is used."""

from .tensorly_torch import from_tltorch as from_tltorch, to_tltorch as to_tltorch
