"""Low-rank deltas on frozen weights: adding, choosing, training, merging, extracting."""

from .combine import combine_lora_
from .extract import Extraction, extract_lora
from .inject import add_lora_, lora_disabled, lora_parameters, lora_rows, remove_lora_, use_adapter
from .merge import merge_lora_, unmerge_lora_

__all__ = [
    "Extraction",
    "add_lora_",
    "combine_lora_",
    "extract_lora",
    "lora_disabled",
    "lora_parameters",
    "lora_rows",
    "merge_lora_",
    "remove_lora_",
    "unmerge_lora_",
    "use_adapter",
]
