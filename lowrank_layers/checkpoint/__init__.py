"""Checkpoints: files of a factored model, files of any model, and the way from a large one to its compressed form."""

from .compress import compress_checkpoint as compress_checkpoint
from .dense_folder import check_is_dense as check_is_dense
from .model_file import KEY as KEY, VERSION as VERSION, load as load, save as save
from .tensor_files import Checkpoint as Checkpoint
