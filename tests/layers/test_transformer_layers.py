"""Torch's transformer layers once their attentions and linear layers are low-rank: the same function in every mode.

In eval mode without gradients torch's encoder layers read the weights of their children and skip the children's
forward: a converted model must give the factored output there as everywhere, not the dense one and not an error.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from ..contracts.tables import relative
from .transformer_rows import (
    FAST,
    TIGHT,
    Row,
    densified,
    factorized,
    fast_rows,
    modes,
    nested_tensor_warnings,
    parts,
    rows,
)

pytestmark = nested_tensor_warnings


@rows
@parts
def test_the_output_is_the_factored_one_in_every_mode(row, part):
    model = row.build()
    dense = copy.deepcopy(model)
    factorized(model, part)
    multiplied = densified(model)
    x = row.inputs()
    for mode in modes(model, [dense, multiplied]):
        got = row.visible(model(**x))
        assert bool(got.isfinite().all()), mode
        assert relative(got, row.visible(multiplied(**x))) < TIGHT, mode
        assert relative(got, row.visible(dense(**x))) > 1e-3, mode  # the factors took part


@rows
def test_at_full_rank_the_output_is_the_dense_one_in_every_mode(row):
    model = row.build()
    dense = copy.deepcopy(model)
    lr.factorize_(model, lr.make_plan(model, rank=10_000))
    x = row.inputs()
    for mode in modes(model, [dense]):
        assert relative(row.visible(model(**x)), row.visible(dense(**x))) < TIGHT, mode


@fast_rows
@parts
def test_without_a_padding_mask_too(row, part):
    model = factorized(row.build(), part)
    multiplied = densified(model)
    x = row.inputs()["src"]
    for mode in modes(model, [multiplied]):
        assert relative(model(x), multiplied(x)) < TIGHT, mode


@rows
def test_gradients_reach_every_factor(row):
    model = factorized(row.build())
    model(**row.inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a bias that moves all scores alike changes nothing
        assert bool(parameter.grad.abs().sum() > 0) or name.endswith("k_proj.up.bias"), name


@pytest.mark.parametrize("part", ["linear1", "feed-forward"])
def test_the_fast_path_would_give_the_same_of_a_layer_put_in_by_hand(part):
    """Whoever reads ``layer.weight`` gets the product of the factors."""
    row = FAST[0]
    model = row.build().eval()
    for name in ("linear1", *(["linear2"] if part != "linear1" else [])):
        setattr(model, name, lr.LowRankLinear.from_dense(getattr(model, name), rank=2))
    with torch.no_grad():
        assert relative(row.visible(model(**row.inputs())), row.visible(densified(model)(**row.inputs()))) < TIGHT


@pytest.mark.parametrize("stacked", [False, True])
def test_an_attention_put_in_by_hand_leaves_the_fast_path(stacked):
    row = Row("Encoder" if stacked else "EncoderLayer", {"batch_first": True})
    model = Row("EncoderLayer", {"batch_first": True}).build()
    model.self_attn = lr.LowRankMultiheadAttention.from_dense(model.self_attn, rank=2)
    model = nn.TransformerEncoder(model, 2) if stacked else model
    multiplied = densified(model)
    for mode in modes(model, [multiplied]):
        assert relative(row.visible(model(**row.inputs())), row.visible(multiplied(**row.inputs()))) < TIGHT, mode


def test_an_attention_put_by_hand_into_a_finished_stack_leaves_the_fast_path():
    """A stack makes nested tensors of padded batches, but not where a weight that it reads is a product of factors."""
    row = Row("Encoder", {"batch_first": True})
    model = row.build().eval()
    for layer in model.layers:
        layer.self_attn = lr.LowRankMultiheadAttention.from_dense(layer.self_attn, rank=2)
    with torch.no_grad():
        assert relative(row.visible(model(**row.inputs())), row.visible(densified(model)(**row.inputs()))) < TIGHT


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_layer_of_a_stack(which):
    row = Row("Encoder", {"batch_first": True})
    model = row.build()
    dense = copy.deepcopy(model)
    lr.factorize_(model, lr.make_plan(model, rank=2, skip=[f"layers.{1 - which}"]))
    multiplied = densified(model)
    assert isinstance(model.layers[1 - which].self_attn, nn.MultiheadAttention)
    x = row.inputs()
    for mode in modes(model, [dense, multiplied]):
        assert relative(row.visible(model(**x)), row.visible(multiplied(**x))) < TIGHT, mode
        assert relative(row.visible(model(**x)), row.visible(dense(**x))) > 1e-3, mode
