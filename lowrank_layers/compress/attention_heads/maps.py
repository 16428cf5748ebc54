"""The maps of one attention to fewer entries of its heads, and its projections with these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .find import Attention, Weights


@dataclass(frozen=True)
class HeadMaps:
    """Maps of the entries of each group of heads to those that stay, all ``[groups, r, d]``.

    Queries read keys, and the output projection reads values, so that each has a map and its reader has another; the
    one times the other transposed is the identity.

    Args:
        queries: of queries.
        keys: of keys.
        outputs: of the columns of the output projection.
        values: of values.
    """

    queries: Tensor
    keys: Tensor
    outputs: Tensor
    values: Tensor

    @property
    def key_projector(self) -> Tensor:
        """What is left of keys of the old size, ``[groups * d, groups * d]``."""
        blocks: Tensor = torch.block_diag(*(self.queries.mT @ self.keys))
        return blocks

    def all_values(self, heads: int) -> Tensor:
        """The map of what all heads deliver to the output projection, ``[groups * heads * r, groups * heads * d]``.

        Args:
            heads: the number of heads of queries that a group has.
        """
        blocks: Tensor = torch.block_diag(*self.values.repeat_interleave(heads, 0))
        return blocks

    def cut(self, attention: Attention) -> Weights:
        """Returns the projections with the entries that stay.

        Args:
            attention: the attention.
        """
        sides = {"q_proj": self.queries, "k_proj": self.keys, "v_proj": self.values}
        found = {key: _with_rows(attention, key, maps) for key, maps in sides.items()}
        weight, bias = attention.projection("o_proj")
        columns = weight.unflatten(1, (attention.groups, attention.heads, -1))
        found["o_proj"] = torch.einsum("mghd,grd->mghr", columns, self.outputs).flatten(1), bias
        return found


def _with_rows(attention: Attention, key: str, maps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection, whose outputs are mapped head by head."""
    weight, bias = attention.projection(key)
    rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    heads = rows.unflatten(0, (attention.groups, -1, attention.size))
    new = torch.einsum("grd,ghdn->ghrn", maps, heads).flatten(0, 2)
    return (new, None) if bias is None else (new[:, :-1], new[:, -1])
