"""Ways to call an attention, with their inputs and masks, for the tests of ``LowRankMultiheadAttention``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

from ..contracts.tables import generator, relative

EMBED, HEADS, KDIM, VDIM = 12, 3, 7, 5
LENGTH, SOURCE, BATCH = 4, 6, 2
TIGHT = 1e-5
MORE = 10_000
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

Attention = lr.LowRankMultiheadAttention


@dataclass(frozen=True)
class Call:
    """One way to call an attention.

    Args:
        settings: arguments of the constructor besides sizes.
        separate: whether keys and values have their own widths.
        cross: whether keys and values have another length than the queries.
        batched: whether there is a batch dimension.
    """

    settings: dict[str, Any]
    separate: bool = False
    cross: bool = True
    batched: bool = True

    @property
    def name(self) -> str:
        switches = [key if value is True else f"no {key}" for key, value in self.settings.items()]
        words = ["separate"] * self.separate + ["self"] * (not self.cross) + ["unbatched"] * (not self.batched)
        return ", ".join([*words, *switches]) or "plain"

    @property
    def source(self) -> int:
        return SOURCE if self.cross else LENGTH

    def dense(self, **more: Any) -> nn.MultiheadAttention:
        widths = {"kdim": KDIM, "vdim": VDIM} if self.separate else {}
        attention = nn.MultiheadAttention(EMBED, HEADS, **{**self.settings, **widths, **more})
        with torch.no_grad():  # torch starts its biases at zero, where a wrong one would not show
            for name, parameter in attention.named_parameters():
                if "bias" in name:
                    parameter.normal_()
        return attention

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        def one(length: int, width: int) -> Tensor:
            if not self.batched:
                return torch.randn(length, width, dtype=dtype)
            lead = (BATCH, length) if self.settings.get("batch_first") else (length, BATCH)
            return torch.randn(*lead, width, dtype=dtype)

        if not self.cross and not self.separate:
            return (one(LENGTH, EMBED),) * 3
        widths = (KDIM, VDIM) if self.separate else (EMBED, EMBED)
        return one(LENGTH, EMBED), one(self.source, widths[0]), one(self.source, widths[1])


def switches() -> Iterator[dict[str, bool]]:
    """Every combination of torch's switches, those that are torch's defaults left out."""
    names = {"bias": False, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True}
    for chosen in product([False, True], repeat=len(names)):
        yield {name: value for (name, value), on in zip(names.items(), chosen, strict=True) if on}


CALLS = [
    Call(settings, separate, cross, batched)
    for settings in switches()
    for separate, cross, batched in product([False, True], repeat=3)
    if batched or "batch_first" not in settings
]
FEW = [
    Call({}),
    Call({}, cross=False),
    Call({"batch_first": True}, cross=False),
    Call({"add_bias_kv": True, "add_zero_attn": True}),
    Call({"bias": False, "batch_first": True}, separate=True),
    Call({}, cross=False, batched=False),
]
calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
few = pytest.mark.parametrize("call", FEW, ids=lambda call: call.name)


def attention_masks(call: Call, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Boolean and float masks, shared by the heads or one per head; no row masks all keys."""
    flat = torch.rand(LENGTH, call.source, generator=generator(1)) > 0.6
    flat[:, 0] = False
    every = torch.rand((BATCH if call.batched else 1) * HEADS, LENGTH, call.source, generator=generator(2)) > 0.6
    every[..., 0] = False
    noise = torch.randn(flat.shape, generator=generator(3), dtype=dtype)
    return {
        "none": None,
        "bool": flat,
        "float": noise,
        "float with -inf": noise.masked_fill(flat, float("-inf")),
        "bool per head": every,
        "float per head": torch.randn(every.shape, generator=generator(4), dtype=dtype),
    }


def padding_masks(call: Call, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    shape = (BATCH, call.source) if call.batched else (call.source,)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., -1] = True
    return {"none": None, "bool": mask, "float": torch.zeros(shape, dtype=dtype).masked_fill(mask, float("-inf"))}


def masks(call: Call, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Tensor | None]]:
    """All combinations of both masks that torch takes: those of one type."""
    for (name, attention), (kind, padding) in product(
        attention_masks(call, dtype).items(), padding_masks(call, dtype).items()
    ):
        if "none" in (name, kind) or name.startswith(kind):
            yield {"attn_mask": attention, "key_padding_mask": padding}


def full(dense: nn.Module) -> lr.LowRankMultiheadAttention:
    return Attention.from_dense(dense, rank=MORE)


def assert_same(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], bound: float = TIGHT):
    assert relative(got[0], expected[0]) < bound
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        assert relative(got[1], expected[1]) < bound


def small(call: Call, **more: Any) -> lr.LowRankMultiheadAttention:
    """An attention whose projections have lost something."""
    return Attention.from_dense(call.dense(**more), rank=2)
