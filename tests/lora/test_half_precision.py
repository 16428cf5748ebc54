"""Adapters are fp32 on a base in half precision, and outputs stay in the dtype of the base: on every kind of layer."""

import copy

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapter import Adapter

from .peer import wrapped
from .test_adapters import FACTORED, MODELS, everything, make, run, scramble

HALVES = [torch.bfloat16, torch.float16]
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)

CASES = [(name, dora) for name in MODELS for dora in (False, True)]
kinds = pytest.mark.parametrize(
    ("name", "dora"), [case for case in CASES if not (case[1] and case[0] in FACTORED)], ids=str
)


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def twins(name, dtype, **settings):
    """A model in half precision, the same in fp32, and an input of each."""
    torch.manual_seed(0)
    model, x = make(name)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    lr.add_lora_(model, everything, rank=1, alpha=1.3, **settings)
    scramble(model)
    wide = copy.deepcopy(model).float()
    return model, x, wide, x.float() if x.is_floating_point() else x


@kinds
@halves
def test_outputs_and_gradients_are_those_in_fp32_up_to_rounding(name, dora, dtype):
    model, x, wide, wide_x = twins(name, dtype, dora=dora)
    assert {p.dtype for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()} == {torch.float32}
    out, expected = run(model, x), run(wide, wide_x)
    assert out.dtype == dtype
    assert relative(out, expected) < 4 * EPS[dtype]
    with torch.no_grad():
        assert relative(run(model, x), expected) < 4 * EPS[dtype]  # torch's fast paths
    direction = torch.randn(out.shape)
    (out.float() * direction).sum().backward()
    (expected * direction).sum().backward()
    for got, right in zip(lr.lora_parameters(model), lr.lora_parameters(wide), strict=True):
        assert got.grad.dtype == torch.float32
        assert relative(got.grad, right.grad) < 16 * EPS[dtype]


@kinds
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_output_has_the_dtype_that_the_base_has(name, dora, base):
    torch.manual_seed(0)
    model, x = make(name)
    model.to(base)
    x = x.to(base) if x.is_floating_point() else x
    try:
        with torch.autocast("cpu", torch.bfloat16):
            plain = run(model, x)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip("oneDNN has no such layer in bfloat16 on this processor")
    lr.add_lora_(model, everything, rank=1, alpha=1.3, dora=dora)
    scramble(model)
    expected = run(copy.deepcopy(model).float(), x.float() if x.is_floating_point() else x)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, x)
        loss = out.float().square().sum()
    loss.backward()
    assert out.dtype == plain.dtype
    assert relative(out, expected) < 4 * EPS[torch.bfloat16]
    assert {p.grad.dtype for p in lr.lora_parameters(model)} == {torch.float32}


ROWS = {
    "linear": (lambda: nn.Linear(8, 6), torch.randn(4, 8)),
    "linear, tokens": (lambda: nn.Linear(8, 6), torch.randn(4, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), torch.randn(4, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 6), torch.randint(9, (4, 5))),
    "bag": (lambda: nn.EmbeddingBag(9, 6), torch.randint(9, (4, 5))),
    "low-rank linear": (lambda: lr.LowRankLinear(8, 6, rank=3), torch.randn(4, 8)),
    "low-rank transposed": (lambda: lr.LowRankConvTranspose1d(3, 4, 3, rank=2), torch.randn(4, 3, 9)),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("ranks", [(2, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@halves
def test_mixed_rows_are_each_adapter_alone(kind, ranks, autocast, dtype):
    """Also where one of the adapters is in half precision itself."""
    build, x = ROWS[kind]
    model = nn.Sequential(build()).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    for name, rank, own in zip("ab", ranks, (None, dtype), strict=True):
        lr.add_lora_(model, everything, rank=rank, alpha=1.3, name=name, dtype=own)
    scramble(model)
    rows = ["a", None, "b", "a"]
    with torch.autocast("cpu", dtype, enabled=autocast), torch.no_grad():
        alone = torch.stack([lr.use_adapter(model, name)(x)[k] for k, name in enumerate(rows)])
        with lr.lora_rows(model, rows):
            mixed = model(x)
    assert mixed.dtype == alone.dtype
    assert relative(mixed, alone) < 4 * EPS[dtype]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FACTORED])
@halves
def test_merged_into_half_precision_is_rounded_once(name, dtype):
    model, x, wide, wide_x = twins(name, dtype)
    expected = run(wide, wide_x)
    lr.merge_lora_(model)
    assert run(model, x).dtype == dtype
    assert relative(run(model, x), expected) < 4 * EPS[dtype]


def train(model, parameters, x, y):
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_small_steps_are_not_lost_and_the_loss_is_the_peers():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16)).bfloat16()
    x = torch.randn(512, 64).bfloat16()
    y = plain(x).float().detach() + torch.randn(512, 16) * 0.05
    theirs = wrapped(copy.deepcopy(plain), ["0", "2"], r=8, lora_alpha=16, scrambled=False)
    model = lr.add_lora_(copy.deepcopy(plain), rank=8, alpha=16)
    half = lr.add_lora_(plain, rank=8, alpha=16, dtype=torch.bfloat16)
    layers = [theirs.base_model.model[k] for k in (0, 2)]
    with torch.no_grad():
        for own in (model, half):
            for k, layer in zip((0, 2), layers, strict=True):
                own[k].lora_weight.adapters["default"].A.copy_(layer.lora_A["default"].weight)
    start = [p.detach().clone() for p in lr.lora_parameters(half)]
    loss = train(model, lr.lora_parameters(model), x, y)
    expected = train(theirs, [p for p in theirs.parameters() if p.requires_grad], x, y)
    assert loss == pytest.approx(expected, rel=0.01)
    train(half, lr.lora_parameters(half), x, y)
    stayed = [float((p == old).float().mean()) for p, old in zip(lr.lora_parameters(half), start, strict=True)]
    assert max(stayed) > 0.5, "half-precision adapters lose steps: the reason for fp32"


@pytest.mark.parametrize("base", [torch.float16, torch.float32], ids=str)
def test_a_gradient_scaler_takes_the_gradients(base):
    model = lr.add_lora_(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)).to(base), everything, rank=2)
    parameters = lr.lora_parameters(model)
    optimizer, scaler = torch.optim.AdamW(parameters, lr=0.1), torch.amp.GradScaler("cpu", init_scale=16.0)
    before = [p.detach().clone() for p in parameters]
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(torch.randint(9, (4, 5))).float().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_the_dtype_of_adapters_can_be_chosen_and_is_checked():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    lr.add_lora_(model, rank=2, name="a")
    lr.add_lora_(model, rank=2, name="b", dtype=torch.bfloat16, dora=True)
    adapters = model[0].lora_weight.adapters
    assert {p.dtype for p in adapters["a"].parameters()} == {torch.float64}
    assert {p.dtype for p in adapters["b"].parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 8).double()).dtype == torch.float64
    for wrong in (torch.int8, "float32", 32):
        with pytest.raises(lr.LowRankError, match="floating point dtype"):
            lr.add_lora_(model, rank=2, name="c", dtype=wrong)


@kinds
@halves
def test_a_model_that_is_rounded_afterwards_keeps_its_scaling(name, dora, dtype):
    torch.manual_seed(0)
    model, x = make(name)
    lr.add_lora_(model, everything, rank=1, alpha=4 / 3, dora=dora)
    scramble(model)
    before = [m.scaling.clone() for m in model.modules() if isinstance(m, Adapter)]
    model.to(dtype)
    wide = copy.deepcopy(model).float()
    out = run(model, x.to(dtype) if x.is_floating_point() else x)
    assert out.dtype == dtype
    assert relative(out, run(wide, x.to(dtype).float() if x.is_floating_point() else x)) < 4 * EPS[dtype]
    after = [m.scaling for m in model.modules() if isinstance(m, Adapter)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@halves
def test_adapters_that_are_loaded_or_extracted_are_fp32(dtype, tmp_path):
    torch.manual_seed(0)
    base, tuned = (nn.Sequential(nn.Linear(8, 6)).to(dtype) for _ in range(2))
    fresh = copy.deepcopy(base)
    model = lr.extract_lora(base, tuned, rank=2).apply_(base)
    assert {p.dtype for p in lr.lora_parameters(model)} == {torch.float32}
    lr.save_lora(model, tmp_path)
    x, other = torch.randn(3, 8).to(dtype), copy.deepcopy(fresh)
    assert torch.equal(lr.load_lora(fresh, tmp_path)(x), model(x))
    assert {p.dtype for p in lr.lora_parameters(fresh)} == {torch.float32}
    assert {p.dtype for p in lr.lora_parameters(lr.load_lora(other, tmp_path, dtype=dtype))} == {dtype}
    assert relative(other(x), model(x)) < 4 * EPS[dtype]
    with pytest.raises(lr.LowRankError, match="floating point dtype"):
        lr.load_lora(other, tmp_path, "second", dtype="half")


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
@halves
def test_an_init_starts_from_the_base_in_half_precision(init, dtype):
    model, x = nn.Sequential(nn.Linear(16, 12)).to(dtype), torch.randn(3, 16).to(dtype)
    expected = model.float()(x.float())
    lr.add_lora_(model.to(dtype), rank=4, init=init)
    assert {t.dtype for name, t in model[0].lora_weight.named_parameters()} == {torch.float32}
    assert relative(model(x), expected) < 4 * EPS[dtype]


def test_a_quantized_base_has_fp32_adapters():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(3, 64).bfloat16()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    base = model(x)
    lr.add_lora_(model, rank=4, alpha=1.3)
    assert torch.equal(model(x), base)
    scramble(model)
    (adapter,) = model[0].lora_weight
    assert adapter.A.dtype == torch.float32
    out = model(x)
    assert out.dtype == torch.bfloat16
    delta = x.float() @ adapter.delta(model[0].lora_weight.layout).mT
    assert relative(out, base.float() + delta) < 4 * EPS[torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), base.float() + delta) < 4 * EPS[torch.bfloat16]
    out.float().sum().backward()
    assert {p.grad.dtype for p in lr.lora_parameters(model)} == {torch.float32}


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.body, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x):
        return self.head(self.body(self.norm(self.table(x))))


@pytest.mark.parametrize("rows", [False, True])
@halves
def test_modules_trained_whole_are_fp32_and_their_outputs_are_the_bases(rows, dtype, tmp_path):
    torch.manual_seed(0)
    base = Headed().eval().to(dtype)
    kinds = {key: tensor.dtype for key, tensor in base.state_dict().items()}
    plain, x = copy.deepcopy(base), torch.randint(9, (4,))
    model = lr.add_lora_(base, ["body"], rank=2, name="a", modules_to_save=["table", "norm", "head"])
    assert {p.dtype for p in lr.lora_parameters(model)} == {torch.float32}
    assert relative(model(x), plain(x)) < 4 * EPS[dtype]
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wide = copy.deepcopy(model).float()
    with lr.lora_rows(model, ["a"] * 4) if rows else torch.enable_grad():
        out = model(x)
    assert out.dtype == dtype
    assert relative(out, wide(x)) < 8 * EPS[dtype]
    out.float().sum().backward()
    assert {p.grad.dtype for p in lr.lora_parameters(model)} == {torch.float32}
    lr.save_lora(model, tmp_path, "a")
    loaded = lr.load_lora(plain, tmp_path, "a")
    for own, saved in zip(lr.lora_parameters(loaded), lr.lora_parameters(model), strict=True):
        assert torch.equal(own, saved)
    lr.merge_lora_(model, unload=True)
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == kinds
    assert relative(model(x), out) < 8 * EPS[dtype]


def test_modules_trained_whole_can_stay_in_half_precision():
    model = lr.add_lora_(Headed().bfloat16(), ["body"], rank=2, modules_to_save=["head"], dtype=torch.bfloat16)
    assert {p.dtype for p in lr.lora_parameters(model)} == {torch.bfloat16}
    assert model(torch.randint(9, (4,))).dtype == torch.bfloat16
