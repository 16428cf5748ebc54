"""Wrong arguments, sparse gradients and exchanged parameters are refused before anything changes."""

import math

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .common import net, one, train_and_return


def stepped():
    p = one()
    optimizer = torch.optim.Adam([p])
    optimizer.step()
    return optimizer


def scheduled():
    optimizer = torch.optim.Adam([one()])
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return optimizer


class Foreign(torch.optim.SGD.__base__):
    def __init__(self, params, weight_decay):
        super().__init__(params, {"lr": 0.1, "weight_decay": weight_decay})


def adam():
    return torch.optim.Adam([one()])


BAD = {
    "a class": (lambda: lr.LowRankProjection(torch.optim.Adam, 4), "call it with the parameters"),
    "a model": (lambda: lr.LowRankProjection(net(), 4), "expected a torch.optim.Optimizer"),
    "LBFGS": (lambda: lr.LowRankProjection(torch.optim.LBFGS([one()]), 4), "LBFGS"),
    "ASGD": (lambda: lr.LowRankProjection(torch.optim.ASGD([one()]), 4), "averages"),
    "Adagrad": (lambda: lr.LowRankProjection(torch.optim.Adagrad([one()]), 4), "another optimizer"),
    "SparseAdam": (lambda: lr.LowRankProjection(torch.optim.SparseAdam([one()]), 4), "sparse"),
    "twice": (lambda: lr.LowRankProjection(lr.LowRankProjection(adam(), 4), 4), "project once"),
    "begun": (lambda: lr.LowRankProjection(stepped(), 4), "give a new one"),
    "scheduled": (lambda: lr.LowRankProjection(scheduled(), 4), "make the scheduler for the projection"),
    "rank 0": (lambda: lr.LowRankProjection(adam(), 0), "rank 0, expected"),
    "rank 0.5": (lambda: lr.LowRankProjection(adam(), 0.5), "ParameterFraction(0.5)"),
    "rank True": (lambda: lr.LowRankProjection(adam(), True), "rank True, expected"),
    "refresh 0": (lambda: lr.LowRankProjection(adam(), 4, refresh=0), "refresh=0"),
    "min_size": (lambda: lr.LowRankProjection(adam(), 4, min_size=-1), "min_size=-1"),
    "seed": (lambda: lr.LowRankProjection(adam(), 4, seed=None), "seed=None"),
    "method": (lambda: lr.LowRankProjection(adam(), 4, method="qr"), "svd, random, power"),
    "rotate": (lambda: lr.LowRankProjection(adam(), 4, rotate=True), "none, first, both"),
    "scale 0": (lambda: lr.LowRankProjection(adam(), 4, scale=0), "scale=0"),
    "scale NaN": (lambda: lr.LowRankProjection(adam(), 4, scale=math.nan), "scale=nan"),
    "target name": (lambda: lr.LowRankProjection(adam(), 4, target="weight"), "named_parameters"),
    "target names": (lambda: lr.LowRankProjection(adam(), 4, target=["weight"]), "named_parameters"),
    "target tensor": (lambda: lr.LowRankProjection(adam(), 4, target=one()), "named_parameters"),
    "decoupled": (lambda: lr.LowRankProjection(adam(), 4, decoupled="yes"), "decoupled='yes'"),
    "foreign": (lambda: lr.LowRankProjection(Foreign([one()], 0.1), 4), "decoupled=True"),
    "lazy": (lambda: lr.LowRankProjection(torch.optim.SGD(nn.LazyLinear(3).parameters()), 4), "run the model once"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs(case):
    call, text = BAD[case]
    with pytest.raises(lr.LowRankError) as caught:
        call()
    assert text in str(caught.value)


def test_a_refusal_leaves_the_optimizer():
    inner = Foreign([one()], 0.1)
    with pytest.raises(lr.LowRankError):
        lr.LowRankProjection(inner, 4)
    assert inner.param_groups[0]["params"][0].numel() == 240
    assert lr.LowRankProjection(inner, 4, decoupled=True).projected()


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = nn.Embedding(20, 12, sparse=True)
    other = one()
    before = other.detach().clone()
    optimizer = lr.LowRankProjection(torch.optim.SGD([other, embedding.weight], lr=0.1), rank=4)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(lr.LowRankError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(other, before)


def test_exchanged_parameters_are_refused():
    model = net()
    optimizer = train_and_return(model)
    optimizer.param_groups[0]["params"][0] = one()
    with pytest.raises(lr.LowRankError, match="exchanged"):
        optimizer.step()


def test_a_comm_state_is_one():
    with pytest.raises(lr.LowRankError, match="got comm_state int"):
        lr.LowRankProjection(torch.optim.SGD(net().parameters(), lr=0.1), rank=2, comm_state=3)
