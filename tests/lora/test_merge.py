"""Merging is one rounding, and unmerging none: on drawn convolutions of every shape and setting."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import lowrank_layers as lr

from .peer import scramble

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place: the relative error of one rounding."""

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

drawn = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@st.composite
def convolutions(draw, transposed=False):
    """A convolution, an input that fits it, and the settings of an adapter."""
    dims = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    flat = draw(st.booleans())
    kernel = (*[1] * (dims - 1), draw(st.integers(1, 4))) if flat else each(1, 3)
    groups, dilation = draw(st.sampled_from([1, 1, 2, 3])), each(1, 2)
    size = tuple(4 + d * k for d, k in zip(dilation, kernel, strict=True))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    if transposed:
        stride = each(1, 2)
        kind = {"stride": stride, "padding": each(0, 1), "output_padding": tuple(s - 1 for s in stride)}
        conv = TRANSPOSED[dims - 1](*channels, kernel, groups=groups, dilation=dilation, **kind)
    else:
        padding = draw(st.sampled_from(["same", "valid", "numbers"]))
        kind = {
            "stride": (1,) * dims if padding == "same" else each(1, 2),
            "padding": each(0, 2) if padding == "numbers" else padding,
            "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        }
        conv = CONVS[dims - 1](*channels, kernel, groups=groups, dilation=dilation, bias=draw(st.booleans()), **kind)
    limit = min(side // groups for side in channels)
    if not transposed:
        limit = min(channels[1] // groups, conv.weight[0].numel())
    else:
        limit = min(channels[0] // groups, conv.weight[0].numel())
    x = torch.randn(2, channels[0], *size)
    return conv, x, {"rank": draw(st.integers(1, limit)), "alpha": draw(st.sampled_from([0.5, 3.0, 16.0]))}


def fp64_weight(module: nn.Module) -> torch.Tensor:
    """Base and delta, formed in fp64."""
    bank = module.lora_weight
    (adapter,) = bank.adapters.values()
    product = bank.layout.product(adapter.A.detach().double(), adapter.B.detach().double())
    return module._parameters["weight"].detach().double() + adapter.scaling.double() * product


def sum_of_magnitudes(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a convolution of absolute values gives, padded as it is: the scale that its errors are measured in."""
    scale = copy.deepcopy(conv)
    with torch.no_grad():
        for parameter in scale.parameters():
            parameter.abs_()
        return scale(x.abs())


def magnitudes(module: nn.Module, plain: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of every term of the unmerged output: base, and the products of the delta one by one."""
    bank = module.lora_weight
    (adapter,) = bank.adapters.values()
    product = bank.layout.product(adapter.A.detach().double().abs(), adapter.B.detach().double().abs())
    scale = copy.deepcopy(plain).double()
    with torch.no_grad():
        scale.weight.abs_().add_(adapter.scaling.double() * product)
    return sum_of_magnitudes(scale, x.double())


def check(conv: nn.Module, x: torch.Tensor, adapter: dict, dtype: torch.dtype) -> None:
    conv, x = conv.to(dtype), x.to(dtype)
    plain = copy.deepcopy(conv)
    model = lr.add_lora_(nn.Sequential(conv), lambda *_: True, **adapter).eval()
    scramble(model)
    with torch.no_grad():
        unmerged = model(x)
        weight, terms = fp64_weight(model[0]), magnitudes(model[0], plain, x)
        lr.merge_lora_(model)
        merged = model(x)

        got = model[0]._parameters["weight"].detach()
        assert got.dtype == dtype
        # formed in fp32, rounded once: within one unit of the last place of the sum in fp64; a sum in fp32 that
        # cancels has the error of its terms instead
        unit = 2 * EPS[dtype] * weight.abs() + 8 * EPS[torch.float32] * term_sizes(model[0], plain)
        assert bool(((got.double() - weight).abs() <= unit).all())
        if dtype != torch.float32:
            exact = (got == weight.to(dtype)).double().mean()
            assert exact > 0.9  # the others are ties within an fp32 rounding

        # fp32: 1e-5 of the sum of the magnitudes of all terms. bf16: unmerged rounds the base output, the inner
        # output, the gated inner output, the delta's output and the sum; merged the weight and its output: 7 roundings
        bound = 1e-5 * terms if dtype == torch.float32 else 7 * EPS[dtype] * terms
        assert bool(((merged.double() - unmerged.double()).abs() <= bound + 1e-30).all())

        lr.unmerge_lora_(model)
    assert torch.equal(model[0]._parameters["weight"], plain.weight)
    assert torch.equal(model(x), unmerged)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), plain(x))


def term_sizes(module: nn.Module, plain: nn.Module) -> torch.Tensor:
    bank = module.lora_weight
    (adapter,) = bank.adapters.values()
    product = bank.layout.product(adapter.A.detach().double().abs(), adapter.B.detach().double().abs())
    return plain.weight.detach().double().abs() + adapter.scaling.double() * product


@drawn
@given(convolutions())
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_merging_a_drawn_convolution_is_one_rounding(dtype, case):
    check(*case, dtype)


@settings(drawn, max_examples=60)
@given(convolutions(transposed=True))
def test_merging_a_drawn_transposed_convolution_is_one_rounding(case):
    check(*case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_merged_weight_is_the_sum_in_fp64_rounded_once(dtype):
    """All of 10,000 half-precision weights, but for those that lie within an fp32 rounding of a tie."""
    model = lr.add_lora_(nn.Sequential(nn.Linear(100, 100, dtype=dtype)), rank=8, alpha=8)
    scramble(model)
    weight = fp64_weight(model[0])
    got = lr.merge_lora_(model)[0]._parameters["weight"].detach()
    assert float((got == weight.to(dtype)).double().mean()) > 0.999
    below = torch.nextafter(got, torch.full_like(got, -torch.inf)).double()
    above = torch.nextafter(got, torch.full_like(got, torch.inf)).double()
    assert bool(((below <= weight) & (weight <= above)).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_a_sum_that_is_not_finite_is_refused_and_nothing_merged(value):
    """A broken adapter must not break the base with it; PEFT calls the check ``safe_merge``."""
    model = lr.add_lora_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=2)
    with torch.no_grad():
        model[1].lora_weight.adapters["default"].A.fill_(value)
        model[1].lora_weight.adapters["default"].B.fill_(value)
    kept = [layer._parameters["weight"].clone() for layer in model]
    with pytest.raises(lr.LowRankError, match=r"'1\.weight' would have NaN or Inf"):
        lr.merge_lora_(model)
    assert all(torch.equal(layer._parameters["weight"], own) for layer, own in zip(model, kept, strict=True))
    lr.merge_lora_(model, safe_merge=False)
    assert not torch.isfinite(model[1]._parameters["weight"]).all()
    lr.unmerge_lora_(model)
    assert all(torch.equal(layer._parameters["weight"], own) for layer, own in zip(model, kept, strict=True))


class Projection(nn.Module):
    """A parameter that is called as a slice of an attention is, and is none."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x @ self.q_proj.mT


def test_a_parameter_with_the_name_of_a_slice_is_merged_as_any_other():
    model, x = nn.Sequential(Projection()), torch.randn(3, 8)
    base = model[0].q_proj.detach().clone()
    lr.add_lora_(model, ["q_proj"], rank=2, init="gaussian")
    scramble(model)
    out = model(x)
    assert not torch.allclose(out, x @ base.mT, atol=1e-3)
    assert torch.allclose(lr.merge_lora_(model)(x), out, atol=1e-5)
    assert torch.equal(lr.remove_lora_(model)[0].q_proj, base)
