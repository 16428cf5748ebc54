"""Decoding with LowRankCache under torch.compile: whole graphs, few of them, and the plain model's logits."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import lowrank_layers as lr

from . import tiny_seq2seq
from .caches import IDS, KEEP, WARNINGS, exact
from .tiny_models import tiny
from .tiny_seq2seq import check_it_calls_an_attention, seq2seq, source, twice

pytestmark = WARNINGS
START = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))


def test_decoding_compiles_into_three_graphs():
    """The first step, a step at any length, and one that compresses."""
    net, cache, plain, graphs = tiny("llama", "lowrank", num_hidden_layers=1), exact(), DynamicCache(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        for one in (cache, plain):
            net(IDS[:1], past_key_values=one)
        decode = torch.compile(net.forward, fullgraph=True, backend=backend)
        for step in range(64):
            token = IDS[1:, step % 40 : step % 40 + 1]
            ours = decode(token, past_key_values=cache).logits
            theirs = net(token, past_key_values=plain).logits
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    assert cache.layers[0].compressed > 80
    assert len(graphs) <= 3


def test_decoding_with_bits_compiles_into_three_graphs_without_a_warning():
    net, graphs = tiny("llama", "lowrank", num_hidden_layers=1), []
    caches = [lr.LowRankCache(bits=8, refresh=None, **KEEP) for _ in range(2)]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        for cache in caches:
            net(IDS[:1], past_key_values=cache)
        decode = torch.compile(net.forward, fullgraph=True, backend=backend)
        for step in range(64):
            token = IDS[1:, step % 40 : step % 40 + 1]
            compiled = decode(token, past_key_values=caches[0]).logits
            eager = net(token, past_key_values=caches[1]).logits
            # a level at the edge of another may be rounded either way
            torch.testing.assert_close(compiled, eager, rtol=0, atol=2e-3)
    torch._dynamo.reset()
    assert caches[0].layers[0].compressed > 80
    assert len(graphs) <= 3


def test_decoding_behind_padding_compiles_into_three_graphs():
    net, cache, plain, graphs = tiny("llama", "lowrank", num_hidden_layers=1), exact(), DynamicCache(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    mask = torch.ones(2, 104, dtype=torch.long)
    mask[1, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    torch._dynamo.reset()
    with torch.no_grad():
        for one in (cache, plain):
            net(IDS, attention_mask=mask[:, :40], position_ids=positions[:, :40], past_key_values=one)
        decode = torch.compile(net.forward, fullgraph=True, backend=backend)
        for at in range(40, 104):
            token, inputs = IDS[:, at % 40 : at % 40 + 1], {"attention_mask": mask[:, : at + 1].contiguous()}
            inputs["position_ids"] = positions[:, at : at + 1]
            ours = decode(token, past_key_values=cache, **inputs).logits
            theirs = net(token, past_key_values=plain, **inputs).logits
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    assert cache.layers[0].compressed > 80
    assert len(graphs) <= 3


@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_decoding_of_encoder_decoders_compiles_into_three_graphs(kind):
    """The first step, a step at any length, and one that compresses."""
    one = {"num_layers": 1} if kind == "t5" else {"encoder_layers": 1, "decoder_layers": 1}
    net, graphs = seq2seq(kind, attn_implementation="lowrank", **one), []
    check_it_calls_an_attention(net)
    cache, plain = tiny_seq2seq.exact(kind), EncoderDecoderCache(*twice(DynamicCache))
    ids = START.repeat(1, 6)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        encoded = {"encoder_outputs": net.get_encoder()(**source(kind))}
        for each in (cache, plain):
            net(**encoded, decoder_input_ids=ids[:, :20], past_key_values=each)
        decode = torch.compile(net.forward, fullgraph=True, backend=backend)
        for token in ids[:, 20:].split(1, 1):
            ours = decode(**encoded, decoder_input_ids=token, past_key_values=cache).logits
            theirs = net(**encoded, decoder_input_ids=token, past_key_values=plain).logits
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
    torch._dynamo.reset()
    assert tiny_seq2seq.compressed(cache)
    assert len(graphs) <= 3
