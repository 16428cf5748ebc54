"""Calibration of every layer counts samples, never their padding."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .layer_checks import no_padding_warning, with_variants
from .tables import relative

pytestmark = no_padding_warning


# what is reflected at the end of a sample is not what is reflected at the end of its padding
@with_variants(lambda row, variant: row.variants[variant].get("padding_mode", "zeros") == "zeros")
@pytest.mark.parametrize("side", ["left", "right"])
def test_calibration_counts_no_padding(row, variant, side):
    """The statistics of padded samples are those of the samples, for any values in the padding."""
    dense = row.dense(variant).requires_grad_(False)
    x = row.sample(dense, (3, 5) if isinstance(dense, nn.Linear) else (3,))
    axes = range(2, x.ndim) if hasattr(dense, "kernel_size") else (1,)
    shape = [n + 4 if axis in axes else n for axis, n in enumerate(x.shape)]
    padded = torch.randint(dense.num_embeddings, shape) if not x.is_floating_point() else torch.full(shape, 1e3)
    if hasattr(dense, "kernel_size"):
        padded.zero_()  # a model that masks anything clears what a window would show of it
    if isinstance(dense, nn.EmbeddingBag) and dense.padding_idx is not None:
        padded.fill_(dense.padding_idx)
    place = [slice(None)] * x.ndim
    for axis in axes:
        place[axis] = slice(4, None) if side == "left" else slice(x.shape[axis])
    padded[tuple(place)] = x
    mask = torch.zeros([shape[0], *(shape[axis] for axis in axes)], dtype=torch.bool)
    mask[(slice(None), *(place[axis] for axis in axes))] = True

    def loss(output, target):
        return (output - 1).square().mean()

    model = nn.Sequential(dense)
    expected = lr.calibrate(model, [x], loss=loss)
    stats = lr.calibrate(model, [padded], loss=loss, mask=lambda batch: mask)
    assert stats.samples == expected.samples
    for key in ("input_shape", "positions", "repeats"):
        assert getattr(stats["0"], key) == getattr(expected["0"], key), key
    assert stats["0"].inputs.rows == expected["0"].inputs.rows
    assert relative(stats["0"].inputs.second, expected["0"].inputs.second) < 1e-6
    assert relative(stats["0"].inputs.mean, expected["0"].inputs.mean) < 1e-5
    if not isinstance(dense, nn.EmbeddingBag) or dense.padding_idx is not None:  # others mix padding into the bag
        assert relative(stats["0"].gradients, expected["0"].gradients) < 1e-5
