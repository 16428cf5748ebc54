"""Attention with a cache for any module: a prompt and single tokens as torch's own attention computes them."""

import torch
from torch import nn

import lowrank_layers as lr

SIZE, HEADS = 8, 2


def test_it_goes_on_where_it_stopped():
    attention = lr.LowRankAttention(lr.KVSettings(rank=SIZE, keep_recent=8, block=16), lr.Rotation.of(SIZE))
    q, k, v = torch.randn(3, 1, HEADS, 120, SIZE)
    exact = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    pieces = [(0, 100), *((i, i + 1) for i in range(100, 120))]
    out = torch.cat([attention(*(x[:, :, a:b] for x in (q, k, v))) for a, b in pieces], 2)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-4)
    assert attention.cache.compressed > 0
    attention.reset()
    assert len(attention.cache) == 0
