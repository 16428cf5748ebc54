"""``trainable_tokens``: training only chosen rows of an embedding, such as those of new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import is_number
from ..errors import LowRankError
from ..layers import is_embedding
from .adapted_weight import AdaptedWeight, base_modules, base_weight
from .adapter import Adapter
from .checks import check_adaptable
from .weight_layout import Matrix, WeightLayout, is_conv1d

Tokens = Iterable[int] | Mapping[str, Iterable[int]]


class TokenRows(Adapter):
    """Trained changes of chosen rows of an embedding or of a head: a low-rank product with one frozen factor.

    With the selection ``S [n, V]``, one 1 in a row, the change of the embedding is ``S^T R``, and only the rows
    ``R [n, D]`` learn; they start at zero.

    Args:
        rows: the parameter ``R``, which the layers of a tied model share.
        tokens: indices of the rows, ``[n]``.
        size: number ``V`` of rows of the embedding.
        head: whether the layer is linear, with ``[V, D]`` read as ``[out, in]``.
    """

    tokens: Tensor
    selection: Tensor

    def __init__(self, rows: nn.Parameter, tokens: Tensor, size: int, *, head: bool) -> None:
        empty = rows.detach()[:0]
        super().__init__(empty, empty, scaling=1.0)
        del self._parameters["A"], self._parameters["B"]
        self.rows = rows
        self.head, self.size = head, size
        self.register_buffer("tokens", tokens.to(rows.device))
        self.register_buffer("selection", F.one_hot(self.tokens, size).to(rows), persistent=False)

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        """The right factor, ``[n, in]``."""
        return self.rows if self.head else self.selection

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        """The left factor, ``[out, n]``."""
        return self.selection.mT if self.head else self.rows.mT

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.selection.copy_(F.one_hot(self.tokens, self.size))

    def resize_(self, layout: WeightLayout, weight: Tensor) -> None:
        """Selects the same rows of a weight with more or fewer of them; rows that are gone add nothing."""
        self.size = layout.matrix(weight).shape[-2 if self.head else -1]
        every = torch.arange(self.size, device=self.tokens.device)
        self.selection = (self.tokens[:, None] == every).to(self.selection)

    def extra_repr(self) -> str:
        """The number of rows, as printed."""
        return f"rows={list(self.rows.shape)} of {self.size}"


def find_tokens(
    model: nn.Module, wanted: Tokens | None, name: str | None, taken: Iterable[str], *, ties: bool = True
) -> dict[AdaptedWeight, TokenRows]:
    """Fresh rows for chosen tokens, by the weights that they belong to; nothing is attached.

    Args:
        model: where to look.
        wanted: indices of tokens of the input embedding, or by the names of layers, or ends of them.
        name: name of the adapter; with ``None`` it may be there already.
        taken: the names of modules that the adapter changes otherwise.
        ties: whether layers with the same parameter as an embedding get the same rows.

    Raises:
        LowRankError: for indices or names that do not exist, or layers that are adapted otherwise.
    """
    found: dict[str, list[int]] = {}
    layers = {
        owner: module
        for owner, module in base_modules(model).items()
        if is_embedding(module) or isinstance(module, nn.Linear) or is_conv1d(module)
    }
    for key, indices in _by_name(model, layers, wanted).items():
        own = [owner for owner in layers if owner == key or owner.endswith(f".{key}")]
        if not own:
            raise LowRankError(f"add_lora_: trainable_tokens has {key!r}, which matches no embedding of the model.")
        for owner in own:
            found[owner] = _checked(indices, len(base_weight(layers[owner], "weight")), owner)
    made: dict[AdaptedWeight, TokenRows] = {}
    for owner, tokens in found.items():
        rows = None
        for each in (owner, *(_tied(layers, owner, found) if ties and is_embedding(layers[owner]) else ())):
            if any(each == other or each.startswith(f"{other}.") for other in taken):
                raise LowRankError(
                    f"add_lora_: {each!r} has trainable_tokens and is adapted or trained whole too; leave it out of"
                    " target= with exclude=, and of modules_to_save=."
                )
            weight = AdaptedWeight(each, "weight", layers[each])
            check_adaptable(weight, name)
            matrix = weight.base.detach()
            if rows is None:
                wide = torch.promote_types(matrix.dtype, torch.float32)
                rows = nn.Parameter(torch.zeros(len(tokens), matrix.shape[1], dtype=wide, device=matrix.device))
            head = weight.layout == Matrix()
            made[weight] = TokenRows(rows, torch.tensor(tokens), len(matrix), head=head)
    return made


def base_rows(weight: AdaptedWeight, tokens: Tensor) -> Tensor:
    """The rows of those tokens in the base, in fp32 or wider."""
    rows = weight.values[tokens]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _by_name(model: nn.Module, layers: Mapping[str, nn.Module], wanted: Tokens | None) -> dict[str, Iterable[int]]:
    if wanted is None:
        return {}
    if isinstance(wanted, Mapping):
        return dict(wanted)
    if isinstance(wanted, (str, int)) or not isinstance(wanted, Iterable):
        raise LowRankError(f"add_lora_: got trainable_tokens={wanted!r}, expected a list of indices, or lists by name.")
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    names = [owner for owner, module in layers.items() if module is embedding]
    names = names or [owner for owner, module in layers.items() if is_embedding(module)]
    if len(names) != 1 or not names[0]:
        raise LowRankError(
            f"add_lora_: got trainable_tokens as a list, and the model has the embeddings {names}; give them by name,"
            " such as trainable_tokens={'embed_tokens': [5, 6]}."
        )
    return {names[0]: wanted}


def _checked(indices: Iterable[int], size: int, owner: str) -> list[int]:
    tokens = list(indices)
    if not tokens or not all(is_number(token) and isinstance(token, int) for token in tokens):
        raise LowRankError(f"add_lora_: got the trainable_tokens {tokens!r} for {owner!r}, expected a list of indices.")
    if min(tokens) < 0 or max(tokens) >= size or len(set(tokens)) < len(tokens):
        raise LowRankError(
            f"add_lora_: got the trainable_tokens {tokens} for {owner!r}, expected different indices from 0 to"
            f" {size - 1}; resize the embedding before adding adapters."
        )
    return tokens


def _tied(layers: Mapping[str, nn.Module], owner: str, named: Mapping[str, Any]) -> list[str]:
    """The names of other layers with the same parameter, which get the same rows."""
    weight = layers[owner]._parameters.get("weight")
    return [
        other
        for other, module in layers.items()
        if weight is not None and other not in named and module._parameters.get("weight") is weight
    ]
