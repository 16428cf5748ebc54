"""A cache of transformers with one limit of bytes, and with subspaces from calibration."""

import pytest
import torch

import lowrank_layers as lr

from .caches import WARNINGS
from .tiny_models import tiny

pytestmark = WARNINGS
PROMPT = torch.randint(3, 90, (2, 150), generator=torch.Generator().manual_seed(0))
SMALL = {"keep_recent": 8, "keep_first": 2, "block": 16}


@pytest.mark.parametrize("implementation", ["lowrank", "sdpa"])
@pytest.mark.parametrize("budget", [0.3, 60_000])
def test_a_budget_is_kept_after_the_prompt(implementation, budget):
    net, cache = tiny("llama", implementation), lr.LowRankCache(budget=budget, **SMALL)
    exact = 2 * 2 * 2 * 150 * 2 * 16 * 4
    with torch.no_grad():
        net(PROMPT, past_key_values=cache)
        assert cache.layers[0].compressed == 0
        with pytest.raises(lr.CheckpointError, match="generate a token first"):
            cache.save("never.safetensors")
        net(PROMPT[:, :1], past_key_values=cache)
    assert {layer.compressed for layer in cache.layers} == {150 - 8 - 2}
    used = sum(tensor.nbytes for _, tensor in cache.tensors())
    limit = budget if isinstance(budget, int) else budget * exact
    assert 0.9 * limit < used <= limit
    net.generate(PROMPT, past_key_values=lr.LowRankCache(budget=budget, **SMALL), max_new_tokens=20, do_sample=False)


def test_a_budget_that_nothing_fits_in_leaves_the_prompt_as_it_was():
    net, cache = tiny("llama"), lr.LowRankCache(budget=0.05, **SMALL)
    with torch.no_grad():
        net(PROMPT, past_key_values=cache)
        with pytest.raises(lr.BudgetError, match="bytes are left"):
            net(PROMPT[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 150


def test_subspaces_from_calibration_serve_every_sequence():
    net = tiny("llama")
    settings = lr.KVSettings(rank=8, **SMALL)
    stats = lr.calibrate(net, [{"input_ids": PROMPT}])
    subspaces = lr.kv_subspaces(net, stats, settings, head_size=16)
    assert len(subspaces) == 2
    cache = lr.LowRankCache(rank=8, subspaces=subspaces, **SMALL)
    out = net.generate(PROMPT, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert out.shape == (2, 170)
    part = cache.layers[0].kv.old[0].parts[0]
    assert torch.equal(part.subspace.basis, subspaces[0][0].basis)
    fitted = lr.LowRankCache(rank=8, **SMALL)
    with torch.no_grad():
        net(PROMPT, past_key_values=fitted)
    for own, offline in zip(fitted.layers[0].kv.dense(), cache.layers[0].kv.dense(), strict=True):
        rows = slice(2, 120)  # of the calibrated text: both are best for it, up to the tokens that stay exact
        assert torch.linalg.vector_norm(own[:, :, rows] - offline[:, :, rows]) < 0.5 * torch.linalg.vector_norm(own)


def test_subspaces_of_too_few_layers_and_a_budget_beside_them_are_refused():
    net = tiny("llama")
    settings = lr.KVSettings(rank=4, **SMALL)
    subspaces = lr.kv_subspaces(net, lr.calibrate(net, [{"input_ids": PROMPT}]), settings, head_size=16)
    with pytest.raises(lr.LowRankError, match="subspaces of 1 layers"), torch.no_grad():
        net(PROMPT, past_key_values=lr.LowRankCache(rank=4, subspaces=subspaces[:1], **SMALL))
    with pytest.raises(lr.LowRankError, match="expected one"):
        lr.LowRankCache(budget=0.5, subspaces=subspaces)
    with pytest.raises(lr.LowRankError, match=r"budget=2\.0"):
        lr.LowRankCache(budget=2.0)
