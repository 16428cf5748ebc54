"""Adapters on layers in int8: what they compute, learn, and refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.layers import bits_of


def network() -> nn.Sequential:
    """An embedding, a layer in int8, and one with factors in int8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 64), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32))
    plan = lr.make_plan(model, rank=8, methods=[lr.SVDMethod()]).drop("0").drop("1")
    for name in ("0", "1", "3"):
        plan.set_bits(name, 8)
    return lr.factorize_(model, plan)


TOKENS = torch.randint(30, (5, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_has_the_delta(dtype):
    model = network().to(dtype)
    dense = lr.densify_(copy.deepcopy(model))
    before = model(TOKENS)
    for each in (model, dense):
        torch.manual_seed(1)
        lr.add_lora_(each, rank=2, target=["0", "1", "3"])
        for parameter in lr.lora_parameters(each):
            nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(model(TOKENS), before)
    assert torch.allclose(model(TOKENS).float(), dense(TOKENS).float(), atol=1e-5 if dtype == torch.float32 else 0.1)
    assert torch.allclose(model[1].weight.float(), dense[1].weight.float(), atol=1e-2)
    lr.remove_lora_(model)
    assert torch.equal(model(TOKENS), before)
    assert type(model[1]) is lr.Int8Linear


def test_adapters_learn_and_codes_do_not():
    model = network()
    codes = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("codes")}
    assert len(codes) == 4
    lr.add_lora_(model, rank=2, target="all-linear")
    optimizer = torch.optim.Adam(lr.lora_parameters(model), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (model(TOKENS) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in codes.items())
    assert [bits_of(model[k]) for k in (0, 1, 3)] == [8, 8, 8]


def test_what_would_write_to_the_weight_is_refused(tmp_path):
    model = lr.add_lora_(network(), rank=2, target=["1"])
    before = model(TOKENS)
    with pytest.raises(lr.LowRankError, match="Int8Linear"):
        lr.merge_lora_(model)
    with pytest.raises(lr.LowRankError, match="densify_"):
        lr.save_lora(model, tmp_path)
    with pytest.raises(lr.LowRankError, match="lora_weight"):
        lr.densify_(model)
    with pytest.raises(lr.LowRankError, match="lora_weight"):
        lr.save(model, tmp_path / "model.safetensors")
    with pytest.raises(lr.LowRankError, match="densify_"):
        lr.add_lora_(network(), rank=2, target=["1"], dora=True)
    assert torch.equal(model(TOKENS), before)


def test_a_copy_has_its_adapters():
    model = lr.add_lora_(network(), rank=2, target=["0", "1"])
    for parameter in lr.lora_parameters(model):
        nn.init.normal_(parameter)
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))
    assert model.half()[1].scale.dtype == torch.float32
