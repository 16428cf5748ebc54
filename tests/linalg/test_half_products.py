"""Products of half-precision matrices, and attention, that are computed in fp32, forward and back."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_layers.calibrate.paused_run import PausedRun, in_resuming_thread, pause
from lowrank_layers.linalg import half_products_in_fp32, in_fp32

HALVES = [torch.bfloat16, torch.float16]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "product",
    [
        lambda: (torch.mm, rand(7, 300), rand(300, 5)),
        lambda: (torch.addmm, rand(5), rand(7, 300), rand(300, 5)),
        lambda: (torch.bmm, rand(3, 7, 300), rand(3, 300, 5)),
        lambda: (torch.baddbmm, rand(3, 7, 5), rand(3, 7, 300), rand(3, 300, 5)),
        lambda: (F.linear, rand(2, 7, 300), rand(5, 300), rand(5)),
        lambda: (torch.matmul, rand(2, 7, 300), rand(2, 300, 5)),
    ],
    ids=["mm", "addmm", "bmm", "baddbmm", "linear", "matmul"],
)
def test_a_product_is_that_of_fp32_rounded_once(product, dtype):
    function, *operands = product()
    operands = [operand.to(dtype) for operand in operands]
    with half_products_in_fp32(True):
        found = function(*operands)
    assert found.dtype == dtype
    assert torch.equal(found, function(*(operand.float() for operand in operands)).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_so_are_gradients(dtype):
    x, weight, gradient = (part.to(dtype) for part in (rand(7, 300), rand(5, 300), rand(7, 5)))
    with half_products_in_fp32(True):
        own, matrix = x.clone().requires_grad_(), weight.clone().requires_grad_()
        F.linear(own, matrix).backward(gradient)
    assert torch.equal(own.grad, (gradient.float() @ weight.float()).to(dtype))
    assert torch.equal(matrix.grad, (gradient.float().mT @ x.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("setting", ["causal", "mask", "plain"])
def test_so_is_attention(setting, dtype):
    """Its output and its gradients, against torch's own in fp32."""
    settings = {"causal": {"is_causal": True}, "mask": {"attn_mask": rand(40, 40).to(dtype)}, "plain": {}}[setting]
    given = [part.to(dtype) for part in rand(4, 2, 3, 40, 16)]

    def attend(settings: dict[str, object], *tensors: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
        output = F.scaled_dot_product_attention(*leaves, **settings)
        output.backward(tensors[3])
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in settings.items()}
    expected = attend(wide, *(part.float() for part in given))
    with half_products_in_fp32(True):
        found = attend(settings, *given)
    assert {each.dtype for each in found} == {dtype}
    assert torch.equal(found[0], expected[0].to(dtype))
    for own, other in zip(found[1:], expected[1:], strict=True):
        # they are computed of the rounded output
        assert torch.allclose(own.float(), other, rtol=0, atol=2 * torch.finfo(dtype).eps * float(other.abs().max()))


def test_other_dtypes_stay_as_they_are():
    x = rand(4, 4)
    with half_products_in_fp32(True):
        assert torch.equal(x @ x, torch.mm(x, x))
        assert (x.double() @ x.double()).dtype == torch.float64
        assert torch.equal(x.bfloat16() * x.bfloat16(), torch.mul(x.bfloat16(), x.bfloat16()))


def test_it_ends_where_it_ends():
    assert not in_fp32()
    with half_products_in_fp32(False):
        assert not in_fp32()
    with half_products_in_fp32(True):
        with half_products_in_fp32(False):
            assert in_fp32()
        with half_products_in_fp32(True):
            assert in_fp32()
        assert in_fp32()
    with pytest.raises(KeyError), half_products_in_fp32(True):
        raise KeyError
    assert not in_fp32()


@pytest.mark.parametrize("enabled", [False, True])
def test_a_paused_run_has_it_from_the_thread_that_made_it(enabled):
    seen = []

    def run() -> None:
        for place in ("first", "second"):
            seen.extend([in_fp32(), in_resuming_thread(in_fp32)])
            pause(place)

    with half_products_in_fp32(enabled):
        paused = PausedRun(run)
    while paused.resume():
        assert not in_fp32()
    assert seen == [enabled] * 4
