"""Calibration: what a model's layers see, and how much its loss feels of what they put out."""

from .calibration import Calibration as Calibration, as_batch as as_batch, calibrate as calibrate
from .fisher import SampledCrossEntropy as SampledCrossEntropy
from .masks import Kept as Kept, data_rows as data_rows
from .padding import MaskOf as MaskOf, Padding as Padding, check_mask as check_mask
from .run import (
    Loss as Loss,
    batch_loss as batch_loss,
    check_batches as check_batches,
    check_loss as check_loss,
    fitting_scale as fitting_scale,
    forward as forward,
    frozen as frozen,
    layer_input as layer_input,
    quiet_eval as quiet_eval,
    target_of as target_of,
)
