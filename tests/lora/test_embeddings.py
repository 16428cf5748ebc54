"""Adapters of embeddings start from A = 0, as PEFT's: rows that never occur do not move."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .peer import wrapped
from .test_adapters import everything

SEEN = torch.tensor([[1, 2, 4], [4, 1, 1]])
KINDS = {
    "embedding": lambda **more: nn.Embedding(9, 6, **more),
    "bag": lambda **more: nn.EmbeddingBag(9, 6, **more),
    "low-rank embedding": lambda **more: lr.LowRankEmbedding(9, 6, rank=3, **more),
    "low-rank bag": lambda **more: lr.LowRankEmbeddingBag(9, 6, rank=3, **more),
}
kinds = pytest.mark.parametrize("kind", KINDS)
inits = pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])


def train(model, parameters, x, decay=0.0):
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=decay)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def rows(model):
    """The embedding of every row."""
    return model[0].weight.detach().clone()


@kinds
@inits
def test_rows_that_never_occur_do_not_move(kind, init):
    model = lr.add_lora_(nn.Sequential(KINDS[kind]()), everything, rank=2, init=init, seed=0)
    (adapter,) = model[0].lora_weight
    assert not adapter.A.any()
    assert bool(adapter.B.any())
    before = rows(model)
    train(model, lr.lora_parameters(model), SEEN, decay=0.1)
    moved = (rows(model) != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 4]


@kinds
def test_the_row_of_the_padding_does_not_move(kind):
    model = lr.add_lora_(nn.Sequential(KINDS[kind](padding_idx=4)), everything, rank=2)
    before = rows(model)
    train(model, lr.lora_parameters(model), SEEN)
    assert (rows(model) != before).any(1).nonzero().flatten().tolist() == [1, 2]


@kinds
def test_freezing_the_random_factor_trains_the_other(kind):
    """In linear layers that is A, in embeddings B."""
    model = lr.add_lora_(nn.Sequential(KINDS[kind](), nn.Linear(6, 4)), everything, rank=2, freeze_a=True)
    learning = [name.split("lora_weight.")[1][-1] for name, p in model.named_parameters() if p.requires_grad]
    assert learning == ["A", "B"]
    before = rows(model)
    train(model, lr.lora_parameters(model), SEEN)
    assert (rows(model) != before).any(1).nonzero().flatten().tolist() == [1, 2, 4]


@pytest.mark.parametrize("padding", [None, 4])
def test_steps_are_those_of_the_peer(padding):
    plain = nn.Sequential(nn.Embedding(9, 6, padding_idx=padding), nn.Linear(6, 4))
    model = lr.add_lora_(copy.deepcopy(plain), ["0"], rank=4, alpha=8)
    theirs = wrapped(plain, ["0"], scrambled=False)
    layer, (adapter,) = theirs.base_model.model[0], model[0].lora_weight
    assert not layer.lora_embedding_A["default"].any()
    assert abs(float(layer.lora_embedding_B["default"].detach().std()) - 1) < 0.4
    many = lr.add_lora_(nn.Sequential(nn.Embedding(9, 400)), everything, rank=8)
    assert float(many[0].lora_weight.adapters["default"].B.detach().std()) == pytest.approx(1, rel=0.05)
    with torch.no_grad():
        adapter.B.copy_(layer.lora_embedding_B["default"])
    train(model, lr.lora_parameters(model), SEEN)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad], SEEN)
    assert torch.allclose(adapter.A, layer.lora_embedding_A["default"], atol=1e-5)
    assert torch.allclose(model(SEEN), theirs(SEEN), atol=1e-5)


def test_a_seed_gives_the_same_start():
    starts = [lr.add_lora_(nn.Sequential(nn.Embedding(9, 6)), everything, rank=2, seed=3) for _ in range(2)]
    assert torch.equal(*(model[0].lora_weight.adapters["default"].B for model in starts))
