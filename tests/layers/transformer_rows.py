"""Torch's transformer layers with their settings, for the tests of their factorization."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

SIZE, HEADS, HIDDEN, LENGTH, SOURCE, BATCH = 16, 2, 24, 5, 6, 3
TIGHT = 1e-5

nested_tensor_warnings = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors is in prototype stage"
)
"""torch says so of its own encoders."""


@dataclass(frozen=True)
class Row:
    """A module of torch, with its settings.

    Args:
        kind: name of a builder in ``BUILDERS``.
        settings: arguments of the layers.
    """

    kind: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return "-".join([self.kind, *(f"{key}={value}" for key, value in self.settings.items())])

    def build(self, **more: Any) -> nn.Module:
        torch.manual_seed(7)
        model = BUILDERS[self.kind]({"dropout": 0.0, "dim_feedforward": HIDDEN, **self.settings, **more})
        with torch.no_grad():  # torch starts biases at zero and norms at one, where a wrong one would not show
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the forward; the last sample ends in padding, which :meth:`visible` leaves out."""
        torch.manual_seed(8)
        lead = [(BATCH, n) if self.settings.get("batch_first") else (n, BATCH) for n in (LENGTH, SOURCE)]
        x, source = (torch.randn(*each, SIZE) for each in lead)
        padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        padding[-1, -2:] = True
        if self.kind.startswith("Encoder"):
            return {"src": x, "src_key_padding_mask": padding}
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        if self.kind.startswith("Decoder"):
            return {"tgt": x, "memory": source, "tgt_mask": causal, "tgt_is_causal": True}
        return {"src": source, "tgt": x, "tgt_mask": causal, "tgt_is_causal": True}

    def visible(self, out: Tensor) -> Tensor:
        """The output without padding, where torch may write zeros."""
        if not self.kind.startswith("Encoder"):
            return out
        out = out if self.settings.get("batch_first") else out.transpose(0, 1)
        return out.masked_select(~self.inputs()["src_key_padding_mask"][..., None])


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "EncoderLayer": lambda settings: nn.TransformerEncoderLayer(SIZE, HEADS, **settings),
    "Encoder": lambda settings: nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, HEADS, **settings), 2),
    "DecoderLayer": lambda settings: nn.TransformerDecoderLayer(SIZE, HEADS, **settings),
    "Decoder": lambda settings: nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, HEADS, **settings), 2),
    "Transformer": lambda settings: nn.Transformer(SIZE, HEADS, 1, 1, **settings),
}


def _row(kind: str, norm_first: bool, activation: str, batch_first: bool) -> Row:
    return Row(kind, {"norm_first": norm_first, "activation": activation, "batch_first": batch_first})


ROWS = [
    *(_row(*each) for each in product(["EncoderLayer", "Encoder"], [False, True], ["relu", "gelu"], [False, True])),
    *(
        _row(kind, *each)
        for kind in ("DecoderLayer", "Decoder", "Transformer")
        for each in ((False, "relu", True), (True, "gelu", False))
    ),
]
"""Every combination of settings for encoders, which torch has fast paths for; two for the others."""
FAST = [row for row in ROWS if row.kind.startswith("Encoder") and row.settings["batch_first"]]
"""Rows for which torch has a fast path (a stack only with the norm last)."""
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
fast_rows = pytest.mark.parametrize("row", FAST, ids=lambda row: row.name)
kinds = pytest.mark.parametrize(
    "row", [Row(kind, {"batch_first": True}) for kind in BUILDERS], ids=lambda row: row.kind
)

PARTS: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "linear1": lambda name: name.endswith("linear1"),
    "linear2": lambda name: name.endswith("linear2"),
    "feed-forward": lambda name: "linear" in name,
    "attention": lambda name: "attn" in name,
    "out_proj": lambda name: name.endswith("self_attn.out_proj"),
}
parts = pytest.mark.parametrize("part", PARTS)


def factorized(model: nn.Module, part: str = "everything", **kwargs: Any) -> nn.Module:
    """Factorizes part of a model at rank 2."""
    chosen = PARTS[part]
    plan = lr.make_plan(model, rank=2, skip=[] if part == "everything" else [lambda name, _: not chosen(name)])
    assert [entry.name for entry in plan]
    assert all(chosen(entry.name) for entry in plan)
    return lr.factorize_(model, plan, **kwargs)


def densified(model: nn.Module) -> nn.Module:
    return lr.densify_(copy.deepcopy(model))


def modes(model: nn.Module, others: list[nn.Module]) -> Any:
    """Puts the models into train and eval mode, with and without gradients."""
    for training, context in product([True, False], [torch.enable_grad, torch.no_grad, torch.inference_mode]):
        for module in (model, *others):
            module.train(training)
        with context():
            yield f"{'train' if training else 'eval'}, {context.__name__}"


class Spy:
    """How often torch's fused encoder layer ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        original = torch._transformer_encoder_layer_fwd

        def counting(*args: Any) -> Tensor:
            self.calls += 1
            return original(*args)

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counting)


def assert_untouched(model: nn.Module, state: dict[str, Tensor], modules: dict[str, nn.Module]) -> None:
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(type(module) is type(modules[name]) for name, module in model.named_modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
