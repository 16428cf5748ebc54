"""Masks joined with what else limits attention: position biases and picked tokens."""

import torch

from lowrank_layers.kv_cache.masks import biased, selected


def test_a_bias_and_a_mask_make_one():
    bias = torch.randn(1, 2, 3, 5)
    lower = torch.ones(3, 5, dtype=torch.bool).tril(2)
    lowest = torch.finfo(torch.float32).min
    causal = torch.where(lower, bias, lowest)
    torch.testing.assert_close(biased(None, bias, causal=True), causal)
    torch.testing.assert_close(biased(None, bias, causal=False), bias)
    torch.testing.assert_close(biased(None, bias[:, :, :1], causal=True), bias[:, :, :1])
    torch.testing.assert_close(biased(lower[None, None], bias, causal=False), causal)
    torch.testing.assert_close(biased(bias, bias, causal=True), 2 * bias)


def test_picked_tokens_and_a_mask_make_one():
    picked = torch.tensor([[[0, 1], [0, 4], [2, 3]]])
    chosen = torch.zeros(3, 5, dtype=torch.bool)
    chosen[[0, 0, 1, 1, 2, 2], [0, 1, 0, 4, 2, 3]] = True
    lower = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.equal(selected(None, picked, 5, causal=False)[0, 0], chosen)
    assert torch.equal(selected(None, picked, 5, causal=True)[0, 0], chosen & lower)
    assert torch.equal(selected(lower[None, None], picked, 5, causal=False)[0, 0], chosen & lower)
    added = selected(torch.zeros(1, 1, 3, 5), picked, 5, causal=False)[0, 0]
    assert torch.equal(added == 0, chosen)
