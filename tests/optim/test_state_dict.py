"""State dicts: complete, small, resumable to the bit, and refused where they do not fit."""

import copy
import io

import pytest
import torch

import lowrank_layers as lr

from .common import METHODS, OPTIMIZERS, net, one, same, train, train_and_return


def test_state_bytes_counts_everything():
    p = one((64, 32))
    optimizer = lr.LowRankProjection(torch.optim.AdamW([p]), rank=4)
    assert optimizer.state_bytes() == 0
    optimizer.step()
    step = 4
    assert optimizer.state_bytes() == 2 * 64 * 4 * 4 + 32 * 4 * 4 + step
    # no state is a view of something bigger
    for value in optimizer.state_dict()["state"][0].values():
        assert not torch.is_tensor(value) or value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_to_the_bit(name, method):
    def made():
        model = net()
        inner = OPTIMIZERS[name](model.parameters())
        return model, lr.LowRankProjection(inner, rank=4, refresh=3, method=method, rotate="first")

    model, optimizer = made()
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, start=4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, again = made()
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, 5, start=4)
    same(model, other)


def test_scheduler_settings_are_in_the_state():
    model = net()
    optimizer = train_and_return(model)
    optimizer.param_groups[0]["lr"] = 0.5
    again = lr.LowRankProjection(torch.optim.AdamW(net().parameters()), rank=4)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.param_groups[0]["lr"] == 0.5


def test_deepcopy_goes_its_own_way():
    model = net()
    optimizer = train_and_return(model)
    other, again = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, start=5)
    train(other, again, 3, start=5)
    same(model, other)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adafactor"])
def test_a_rule_goes_on_to_the_bit_from_a_file(name):
    whole, half, other = net(), net(), net()
    rule = lr.Energy(0.8)

    def made(model):
        return lr.LowRankProjection(OPTIMIZERS[name](model.parameters()), rule, refresh=3)

    train(whole, made(whole), 8)
    optimizer = made(half)
    train(half, optimizer, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(half.state_dict())
    again = made(other)
    train(net(), made(net()), 1)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(other, again, 4, start=4)
    same(whole, other)
    with pytest.raises(lr.LowRankError, match="load_state_dict: got a projector"):
        lr.LowRankProjection(OPTIMIZERS[name](net().parameters()), 7).load_state_dict(again.state_dict())


@pytest.mark.parametrize("wrong", ["rank", "groups", "plain"])
def test_foreign_states_are_refused(wrong):
    model = net()
    saved = train_and_return(model).state_dict()
    if wrong == "plain":
        plain = torch.optim.AdamW(model.parameters())
        train(model, plain, 1)
        saved = plain.state_dict()
    parameters = list(net().parameters())
    inner = torch.optim.AdamW(parameters[1:] if wrong == "groups" else parameters)
    optimizer = lr.LowRankProjection(inner, rank=5 if wrong == "rank" else 4)
    with pytest.raises(lr.LowRankError, match="load_state_dict: got"):
        optimizer.load_state_dict(saved)
    assert optimizer.state_bytes() == 0
