"""Operating on a model in place: which layers it has, which must stay, and replacing them with all that depends on it.

- :func:`replace_` puts modules in the place of others, under all their names, and takes care of attentions, fast paths,
  ``resize_token_embeddings`` and the optimizer. It is the one way to change which modules a model has.
- :func:`opened_attentions` shows the four projections of every ``nn.MultiheadAttention`` inside a ``with`` block.
- :func:`update_shortcuts_` is for those who change a layer where it stands, as adapters do.
- :func:`check_model` first: it refuses what cannot be changed in place. :func:`walk_layers` visits the layers,
  :func:`select` chooses some by name, type or predicate, :func:`reasons_to_keep` says which must stay, and why.
"""

from .attention import open_attentions, openable_attentions, opened_attentions
from .check_model import check_densifiable, check_factors, check_model, is_quantized
from .description import ModelDescription
from .materialize import check_can_be_filled, fill_, tied_names
from .optimizer import Succession, check_optimizer, remap_optimizer_
from .reasons import reason_to_keep, reasons_to_keep
from .replace import replace_
from .select import Selector, select
from .shortcuts import update_shortcuts_
from .storage import separate, shared_names
from .tree import module_aliases, named_tensors, walk_layers

__all__ = [
    "ModelDescription",
    "Selector",
    "Succession",
    "check_can_be_filled",
    "check_densifiable",
    "check_factors",
    "check_model",
    "check_optimizer",
    "fill_",
    "is_quantized",
    "module_aliases",
    "named_tensors",
    "open_attentions",
    "openable_attentions",
    "opened_attentions",
    "reason_to_keep",
    "reasons_to_keep",
    "remap_optimizer_",
    "replace_",
    "select",
    "separate",
    "shared_names",
    "tied_names",
    "update_shortcuts_",
    "walk_layers",
]
