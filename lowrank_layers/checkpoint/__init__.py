"""Checkpoints: files of a factored model, files of any model, and the way from a large one to its compressed form."""

from .compress import compress_checkpoint as compress_checkpoint
from .model_file import KEY as KEY, VERSION as VERSION, load as load, save as save
from .tensor_files import Checkpoint as Checkpoint
