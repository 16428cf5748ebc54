"""Calibration: what a model's layers see, and how much its loss feels of what they put out."""

from .calibration import Calibration, as_batch, calibrate
from .fisher import SampledCrossEntropy
from .masks import Kept, data_rows
from .padding import MaskOf, Padding, check_mask
from .run import (
    Loss,
    batch_loss,
    check_batches,
    check_loss,
    fitting_scale,
    forward,
    frozen,
    layer_input,
    quiet_eval,
    target_of,
)

__all__ = [
    "Calibration",
    "Kept",
    "Loss",
    "MaskOf",
    "Padding",
    "SampledCrossEntropy",
    "as_batch",
    "batch_loss",
    "calibrate",
    "check_batches",
    "check_loss",
    "check_mask",
    "data_rows",
    "fitting_scale",
    "forward",
    "frozen",
    "layer_input",
    "quiet_eval",
    "target_of",
]
