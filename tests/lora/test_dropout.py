"""Dropout draws one mask per adapted layer and call, as in PEFT, and backward goes through the mask of forward."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_layers as lr

from .peer import wrapped


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


def test_every_layer_and_every_pass_draws_a_mask_of_its_own():
    model, x = adapted(), torch.eye(16)
    found = [*masks(model, x), *masks(model, x)]
    assert all(0 < mask.sum() < 16 for mask in found)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(found, 2))
    assert all(mask.all() for mask in masks(model.eval(), x))


def test_masks_of_two_layers_are_independent():
    """Of entries that are kept with probability 1/2 in each, a quarter is kept in both, and a quarter in neither."""
    torch.manual_seed(0)
    model, x = Projections(), torch.ones(40_000, 16)
    lr.add_lora_(model, rank=1, dropout=0.5)
    with torch.no_grad():
        for layer in model.children():
            (adapter,) = layer.lora_weight
            adapter.A.copy_(torch.eye(16)[:1]), adapter.B.fill_(1)
        q, k, _ = ((out - base(layer, x))[:, 0] > 1 for layer, out in zip(model.children(), model(x), strict=True))
    for both in (q & k, q & ~k, ~q & k, ~q & ~k):
        assert abs(float(both.float().mean()) - 0.25) < 0.01  # four standard deviations


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 16)], ids=str)
def test_outputs_and_gradients_are_those_of_peft_with_the_same_seed(shape: tuple[int, ...]):
    """Both draw q's mask, then k's, then v's, from torch's global generator."""
    model, names = adapted(), ["q_proj", "k_proj", "v_proj"]
    plain = lr.remove_lora_(copy.deepcopy(model))
    theirs = wrapped(plain, names, r=4, lora_alpha=4, lora_dropout=0.5).train()
    peers = {name: getattr(theirs.base_model.model, name) for name in names}
    for name, peer in peers.items():
        (adapter,) = getattr(model, name).lora_weight
        peer.lora_A["default"].weight.data.copy_(adapter.A)
        peer.lora_B["default"].weight.data.copy_(adapter.B)
    inputs, outs = [torch.randn(shape).requires_grad_() for _ in range(2)], []
    inputs[1].data.copy_(inputs[0])
    for each, x in zip((model, theirs), inputs, strict=True):
        torch.manual_seed(3)
        outs.append(torch.stack(each(x)))
        outs[-1].square().sum().backward()
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, peer in peers.items():
        (adapter,) = getattr(model, name).lora_weight
        torch.testing.assert_close(adapter.A.grad, peer.lora_A["default"].weight.grad)
        torch.testing.assert_close(adapter.B.grad, peer.lora_B["default"].weight.grad)


def test_the_input_is_kept_once_for_all_layers_with_one_byte_per_entry_for_each_mask():
    model, x = adapted(), torch.randn(64, 16).requires_grad_() + 0
    inner = 3 * 2 * 64 * 4 * 4  # A x, and its multiple by the scaling
    assert saved(model, x) <= 64 * 16 * 3 + inner
    assert len(inputs_kept(model, x)) == 1


def inputs_kept(model: nn.Module, x: Tensor) -> set[int]:
    """The storages that hold the input, dropped or not, between forward and backward."""
    found: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == x.shape and tensor.dtype == x.dtype:
            found.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return found


def test_gradients_are_those_of_finite_differences_twice():
    layer = nn.Sequential(nn.Linear(5, 4)).double()
    lr.add_lora_(layer, rank=2, dropout=0.3, seed=0)
    (adapter,) = layer[0].lora_weight
    factors = [torch.randn(part.shape, dtype=torch.float64).requires_grad_() for part in (adapter.A, adapter.B)]

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        values = {"0.lora_weight.adapters.default.A": a, "0.lora_weight.adapters.default.B": b}
        return torch.func.functional_call(layer, values, (x,))

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *factors), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, *factors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_adapter_learns_through_its_mask(dtype: torch.dtype):
    model, x = adapted(), torch.randn(32, 16).requires_grad_()
    exact, y = copy.deepcopy(model), x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        out = torch.stack(model(x))
    assert out.dtype == dtype
    torch.manual_seed(3)
    expected = torch.stack(exact(y))
    out.float().square().mean().backward()
    expected.square().mean().backward()
    pairs = [
        (x.grad, y.grad),
        *zip(*([p.grad for p in lr.lora_parameters(each)] for each in (model, exact)), strict=True),
    ]
    for got, want in pairs:
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 8 * torch.finfo(dtype).eps


def test_compiled_and_in_inference_mode_it_still_drops():
    model, x = adapted(), torch.eye(16)
    torch._dynamo.reset()
    compiled = torch.compile(model.q_proj, backend="aot_eager", fullgraph=True)
    for out in (compiled(x), inferred(model.q_proj, x)):
        kept = (out - base(model.q_proj, x)).abs().sum(-1) > 1e-6
        assert 0 < kept.sum() < 16


@torch.inference_mode()
def inferred(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.clone())


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
