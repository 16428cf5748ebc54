"""Smaller heads of attention: fewer entries of queries and keys under RoPE, and of values."""

from .reduce_head_dim import reduce_head_dim_ as reduce_head_dim_
