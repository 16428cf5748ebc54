"""Operating on a model in place: which layers it has, which must stay, and replacing them with all that depends on it.

- :func:`replace_` puts modules in the place of others, under all their names, and takes care of attentions, fast paths,
  ``resize_token_embeddings`` and the optimizer. It is the one way to change which modules a model has.
- :func:`opened_attentions` shows the four projections of every ``nn.MultiheadAttention`` inside a ``with`` block.
- :func:`update_shortcuts_` is for those who change a layer where it stands, as adapters do.
- :func:`check_model` first: it refuses what cannot be changed in place. :func:`walk_layers` visits the layers,
  :func:`select` chooses some by name, type or predicate, :func:`reasons_to_keep` says which must stay, and why.
- :class:`ModelDescription` is what tells a factored model from the dense one, for plans and files.
"""

from .attention import (
    open_attentions as open_attentions,
    openable_attentions as openable_attentions,
    opened_attentions as opened_attentions,
)
from .check_model import (
    check_densifiable as check_densifiable,
    check_factors as check_factors,
    check_model as check_model,
    is_quantized as is_quantized,
)
from .description import ModelDescription as ModelDescription
from .materialize import check_can_be_filled as check_can_be_filled, fill_ as fill_, tied_names as tied_names
from .optimizer import (
    Succession as Succession,
    check_optimizer as check_optimizer,
    remap_optimizer_ as remap_optimizer_,
)
from .quantization_config import (
    QUANT_METHOD as QUANT_METHOD,
    from_quantization_config as from_quantization_config,
    to_quantization_config as to_quantization_config,
)
from .reasons import reason_to_keep as reason_to_keep, reasons_to_keep as reasons_to_keep
from .replace import replace_ as replace_
from .select import Selector as Selector, matches_name as matches_name, select as select
from .shortcuts import update_shortcuts_ as update_shortcuts_
from .storage import separate as separate, shared_names as shared_names
from .tree import module_aliases as module_aliases, named_tensors as named_tensors, walk_layers as walk_layers
