"""Low-rank deltas on frozen weights: adding, choosing, training, merging, extracting."""

from .adalora import LoraRankAllocator as LoraRankAllocator
from .combine import combine_lora_ as combine_lora_
from .extract import Extraction as Extraction, extract_lora as extract_lora
from .gradients import weight_gradients as weight_gradients
from .inject import add_lora_ as add_lora_
from .load import load_lora as load_lora
from .loftq import loftq_ as loftq_
from .merge import merge_lora_ as merge_lora_, unmerge_lora_ as unmerge_lora_
from .peft.save import save_lora as save_lora
from .remove import remove_lora_ as remove_lora_
from .swap import swap_lora_ as swap_lora_
from .switching import (
    lora_disabled as lora_disabled,
    lora_parameters as lora_parameters,
    lora_rows as lora_rows,
    use_adapter as use_adapter,
)
from .transformers_checkpoints import lora_checkpoints as lora_checkpoints
