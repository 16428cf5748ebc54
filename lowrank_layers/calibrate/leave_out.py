"""Leaving out the first and last tokens of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..checks import check_integer
from ..errors import LowRankError

MASKS = ("attention_mask", "tgt_key_padding_mask", "src_key_padding_mask", "key_padding_mask")
"""Masks of the sequence that a model is called with."""


@dataclass(frozen=True)
class LeaveOut:
    """The ``mask`` of a calibration that counts the first or last tokens of each sample as padding.

    The first token of a text often has activations a thousand times as large as the others (attention sinks: Xiao et
    al., 2024), and the first ones are predicted without much context. An encoder whose embedding is an average over all
    tokens does much worse without the first (``benchmarks/robust_statistics.py``). The model still sees all tokens.
    Padding is not counted: of a sample padded at the left, the first tokens are those after the padding, as the model's
    own masks say. An encoder and a decoder leave out the first and last tokens of both of their sequences.

    Args:
        first: how many tokens at the beginning.
        last: how many tokens at the end.

    Raises:
        LowRankError: for what is no number of tokens.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
        >>> stats = lr.calibrate(model, [torch.randint(20, (4, 16))], mask=lr.LeaveOut(first=1))
        >>> stats["1"].inputs.rows
        60
    """

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_integer(getattr(self, field.name), "LeaveOut", field.name, 0)

    def narrow(self, mask: Tensor) -> Tensor:
        """Returns the mask without the first and last tokens of each sample.

        Args:
            mask: true where a position is data.

        Shape:
            ``[B, T]``.
        """
        place = mask.cumsum(1)
        return mask & (place > self.first) & (place <= place[:, -1:] - self.last)


def with_masks(tensors: Mapping[str, Tensor], *, pair: bool, labelled: bool, time_first: bool) -> dict[str, Tensor]:
    """Returns the arguments of a model, with masks of all positions where it was called with none.

    Args:
        tensors: the arguments by name.
        pair: whether the model has an encoder and a decoder.
        labelled: whether labels say what padding is, in the decoder if there is one.
        time_first: whether inputs are ``[T, B, C]``.

    Raises:
        LowRankError: if there is no mask, and the inputs have no positions.
    """
    found = dict(tensors)
    if pair and not labelled and "decoder_attention_mask" not in tensors:
        decoded = next((tensors[name] for name in ("decoder_input_ids", "labels") if name in tensors), None)
        if decoded is not None:
            found["decoder_attention_mask"] = decoded.new_ones(decoded.shape[:2], dtype=torch.bool)
    if (labelled and not pair) or any(name in tensors and tensors[name].ndim == 2 for name in MASKS):
        return found
    inputs = next((tensors[name] for name in ("input_ids", "inputs_embeds", *tensors) if name in tensors), None)
    if inputs is None or inputs.ndim != (3 if inputs.is_floating_point() else 2):
        got = "no tensor" if inputs is None else f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape)}"
        raise LowRankError(f"LeaveOut: the model was called with {got}, expected tokens [B, T] or features [B, T, C].")
    sizes = inputs.shape[1::-1] if time_first and inputs.ndim == 3 else inputs.shape[:2]
    return found | {"attention_mask": inputs.new_ones(sizes, dtype=torch.bool)}
