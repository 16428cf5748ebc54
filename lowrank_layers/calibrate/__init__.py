"""Calibration: what a model's layers see, and how much its loss feels of what they put out."""

from .batch_masks import MaskOf as MaskOf, check_mask as check_mask
from .calibration import Calibration as Calibration, calibrate as calibrate
from .fisher import (
    SampledCrossEntropy as SampledCrossEntropy,
    counted_positions as counted_positions,
    describe_output as describe_output,
    main_output as main_output,
)
from .layer_recorder import as_batch as as_batch
from .leave_out import LeaveOut as LeaveOut
from .loss_scale import fitting_scale as fitting_scale
from .masks import DataRows as DataRows, mask_of_rows as mask_of_rows, masked_input_rows as masked_input_rows
from .padding import Padding as Padding
from .run import (
    Loss as Loss,
    batch_loss as batch_loss,
    call_loss as call_loss,
    check_batches as check_batches,
    check_loss as check_loss,
    forward as forward,
    frozen as frozen,
    layer_input as layer_input,
    quiet_eval as quiet_eval,
    target_of as target_of,
)
from .watched import is_calibrated as is_calibrated
