"""Low-rank deltas on frozen weights: adding, choosing, training, merging, extracting."""

from .adalora import LoraRankAllocator
from .combine import combine_lora_
from .extract import Extraction, extract_lora
from .gradients import weight_gradients
from .inject import add_lora_
from .loftq import loftq_
from .merge import merge_lora_, unmerge_lora_
from .peft.load import load_lora
from .peft.save import save_lora
from .remove import remove_lora_
from .swap import swap_lora_
from .switching import lora_disabled, lora_parameters, lora_rows, use_adapter

__all__ = [
    "Extraction",
    "LoraRankAllocator",
    "add_lora_",
    "combine_lora_",
    "extract_lora",
    "load_lora",
    "loftq_",
    "lora_disabled",
    "lora_parameters",
    "lora_rows",
    "merge_lora_",
    "remove_lora_",
    "save_lora",
    "swap_lora_",
    "unmerge_lora_",
    "use_adapter",
    "weight_gradients",
]
