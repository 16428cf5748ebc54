"""Removing hidden units: features of linear layers and channels of convolutions that one other layer reads."""

from .remove_units import remove_units_ as remove_units_
