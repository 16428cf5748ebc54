"""One dropout for all layers that read the same tensor, and never a mask that backward does not share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def adapted() -> Projections:
    torch.manual_seed(0)
    model = Projections()
    lr.add_lora_(model, rank=4, dropout=0.5, seed=0)
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.normal_()
    return model


def base(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad(), lr.lora_disabled(layer):
        return layer(x)


def masks(model: Projections, x: Tensor) -> list[Tensor]:
    """Which rows, all multiples of unit vectors, each layer's adapter saw: a dropped entry leaves a row no delta."""
    return [(out - base(layer, x)).abs().sum(-1) > 1e-6 for layer, out in zip(model.children(), model(x), strict=True)]


def saved(model: nn.Module, x: Tensor) -> int:
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


def test_layers_that_read_one_tensor_share_a_draw_and_a_second_pass_draws_anew():
    model, x = adapted(), torch.eye(16)
    q, k, v = masks(model, x)
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert 0 < q.sum() < 16
    again = masks(model, x)
    assert not torch.equal(again[0], q)
    assert torch.equal(again[0], again[2])


def test_other_tensors_a_changed_tensor_and_eval_share_nothing():
    model, x = adapted(), torch.eye(16)
    torch.manual_seed(1)
    q = masks(model, x)[0]
    x.mul_(2)
    k = (model.k_proj(x) - base(model.k_proj, x)).abs().sum(-1) > 1e-6
    assert not torch.equal(q, k), "the tensor was written to between the two"
    assert all(mask.all() for mask in masks(model.eval(), x))


def test_one_copy_of_the_input_is_kept_with_a_byte_an_entry_for_the_mask():
    model, x = adapted(), torch.randn(64, 16, requires_grad=True)
    inner = 3 * 2 * 64 * 4 * 4  # A x, and its multiple by the scaling
    assert saved(model, x) <= 64 * 16 * (4 + 1) + inner


def agrees(out: Tensor, plain: Tensor, adapter: nn.Module, gradient: Tensor) -> None:
    """The delta is linear in ``B``, so that ``<gradient, B>`` is the delta (Euler): of another mask it would not be."""
    torch.testing.assert_close((gradient * adapter.B).sum(), out.sum() - plain.sum())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_all_computes_again_what_it_computed(reentrant: bool):
    model, x = adapted(), torch.randn(8, 16, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=reentrant)
    sum(own.sum() for own in out).backward()
    for layer, own in zip(model.children(), out, strict=True):
        (adapter,) = layer.lora_weight
        agrees(own, base(layer, x), adapter, adapter.B.grad)


@pytest.mark.parametrize("which", ["q_proj", "k_proj", "v_proj"])
def test_a_checkpoint_around_one_computes_again_what_it_computed(which: str):
    model, x = adapted(), torch.randn(8, 16, requires_grad=True)
    out = {}
    for name, layer in model.named_children():
        out[name] = checkpoint(layer, x, use_reentrant=False) if name == which else layer(x)
    sum(own.sum() for own in out.values()).backward()
    for name, layer in model.named_children():
        (adapter,) = layer.lora_weight
        agrees(out[name], base(layer, x), adapter, adapter.B.grad)


def test_the_share_of_kept_entries_and_the_mean_are_those_of_dropout():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(1, 1)), torch.ones(20000, 1)
    lr.add_lora_(model, rank=1, dropout=0.25)
    with torch.no_grad():
        (adapter,) = model[0].lora_weight
        adapter.A.fill_(1), adapter.B.fill_(1)
    delta = model(x).detach() - base(model[0], x)
    assert abs(float((delta > 0.5).float().mean()) - 0.75) < 0.01
    assert abs(float(delta.mean()) - 1) < 0.02
