"""LoRA-GA, and the gradients that it looks at."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_layers as lr

from . import peer

GAMMA = 16
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (20, 12)),
    "transformers' Conv1D": (lambda: conv1d(12, 10), (20, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 10, 3, padding=1), (6, 4, 5, 5)),
    "grouped": (lambda: nn.Conv1d(8, 12, 3, groups=2), (6, 8, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(9, 6, 2, stride=2), (6, 9, 4, 4)),
    "grouped and transposed": (lambda: nn.ConvTranspose1d(12, 8, 3, groups=2), (6, 12, 7)),
    "embedding": (lambda: nn.Embedding(14, 10), None),
}


def conv1d(into, out):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(out, into)


def everything(name, module):
    return True


def square(output, target):
    return (output - target).square().mean()


def batches_for(layer, shape, count=3):
    xs = [torch.randint(14, (30,)) if shape is None else torch.randn(shape) for _ in range(count)]
    dtype = layer.weight.dtype
    xs = [x if x.dtype == torch.long else x.to(dtype) for x in xs]
    return [(x, torch.randn_like(layer(x))) for x in xs]


def classifier():
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.ReLU(), nn.Linear(12, 4))
    return model, [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(3)]


def test_gradients_are_those_of_the_mean_of_the_batches():
    model, batches = classifier()
    found = lr.weight_gradients(model, iter(batches), F.cross_entropy)
    copied = copy.deepcopy(model).eval()
    sum(F.cross_entropy(copied(x), y) for x, y in batches).div(3).backward()
    assert list(found) == ["0.weight", "4.weight"]
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.allclose(gradient, copied.get_parameter(name).grad, atol=1e-7)


def test_the_model_is_left_as_it_was():
    model, batches = classifier()
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.full_like(model[4].weight, 3.0)
    state = copy.deepcopy(model.state_dict())

    def look():
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    before, grad = look(), model[4].weight.grad
    with torch.no_grad():
        found = lr.weight_gradients(model, batches, F.cross_entropy)
    assert bool(found["0.weight"].any())
    assert look() == before
    assert model[4].weight.grad is grad
    assert bool((grad == 3).all())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def fails(output, target):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        lr.weight_gradients(model, batches, fails)
    assert look() == before


def test_half_precision_is_summed_in_fp32():
    """1 + 512 steps of 2**-9 of it: a bf16 sum would stay at 1."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    batches = [(ones,), *[(ones * 2**-9,)] * 512]
    found = lr.weight_gradients(layer, batches, lambda output, _: output.sum())
    assert float(found["weight"]) * 513 == pytest.approx(2.0, rel=1e-6)


def test_adapted_tied_and_sparse_models():
    model = nn.ModuleDict({"table": nn.Embedding(9, 6, sparse=True), "head": nn.Linear(6, 9, bias=False)})
    model.forward = lambda x: model["head"](model["table"](x))
    x = torch.randint(9, (5,))
    assert not lr.weight_gradients(model, [(x, x)], F.cross_entropy)["table.weight"].is_sparse
    model["head"].weight = model["table"].weight
    apart = lr.weight_gradients(copy_apart(model), [(x, x)], F.cross_entropy)
    tied = lr.weight_gradients(model, [(x, x)], F.cross_entropy)
    assert set(tied) == {"table.weight", "head.weight"}
    for gradient in tied.values():
        assert torch.allclose(gradient, apart["table.weight"] + apart["head.weight"], atol=1e-6)

    plain, batches = classifier()
    before = lr.weight_gradients(plain, batches, F.cross_entropy)
    lr.add_lora_(plain, rank=2)
    after = lr.weight_gradients(plain, batches, F.cross_entropy)
    assert set(after) == set(before)
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)
    plain[0].lora_weight.adapters["default"].B.data.normal_()
    moved = lr.weight_gradients(plain, batches, F.cross_entropy)
    formed = classifier()[0]
    formed.load_state_dict(lr.merge_lora_(plain, unload=True).state_dict())
    expected = lr.weight_gradients(formed, batches, F.cross_entropy)
    assert not torch.allclose(moved["0.weight"], before["0.weight"], atol=1e-4)
    assert all(torch.allclose(moved[key], expected[key], atol=1e-5) for key in before)


def copy_apart(model):
    twin = nn.ModuleDict({"table": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    twin.forward = lambda x: twin["head"](twin["table"](x))
    with torch.no_grad():
        twin["table"].weight.copy_(model["table"].weight)
        twin["head"].weight.copy_(model["table"].weight)
    return twin


@pytest.mark.parametrize(
    ("batches", "loss", "match"),
    [
        ([], F.cross_entropy, "batches is empty"),
        (torch.randn(4, 8), F.cross_entropy, r"write \[batch\]"),
        ([(torch.randn(4, 8), None)], lambda output, _: output, "expected a scalar tensor"),
        ([(torch.full((4, 8), torch.nan), None)], lambda output, _: output.sum(), "NaN or Inf"),
        (["text"], F.cross_entropy, "got a batch of type str"),
    ],
)
def test_what_gradients_cannot_be_taken_of(batches, loss, match):
    with pytest.raises(lr.LowRankError, match=match):
        lr.weight_gradients(nn.Sequential(nn.Linear(8, 4)), batches, loss)


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_step_is_along_the_best_approximation_of_twice_the_rank(name):
    """In fp64; the step is so small that only its first order is left."""
    build, shape = LAYERS[name]
    model = nn.Sequential(build()).double()
    batches = batches_for(model[0], shape, 1)
    gradients = lr.weight_gradients(model, batches, square)
    base = model[0].weight.detach().clone()
    x, y = batches[0]
    out = model(x)
    lr.add_lora_(model, everything, rank=2, alpha=6, init=lr.LoRAGA(gradients))
    assert torch.allclose(model(x), out, atol=1e-12)  # starts where the base is
    with lr.lora_disabled(model):
        assert torch.equal(model(x), out)
    step = 1e-7
    optimizer = torch.optim.SGD(lr.lora_parameters(model), lr=step)
    square(model(x), y).backward()
    optimizer.step()
    moved = (model[0].weight.detach() - base) / -step

    kind = model[0].lora_weight.layout
    got, full = kind.matrix(moved), kind.matrix(gradients["0.weight"].double())
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    assert bool((s[..., 4] > 1e-3 * s[..., 0]).all())  # there is something to leave out
    best = (u[..., :4] * s[..., None, :4]) @ vh[..., :4, :]
    factor = 3.0**2 * full.shape[-2] ** 0.5 / GAMMA
    assert float((got - factor * best).norm() / (factor * best).norm()) < 1e-4


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # hooks of PEFT
def test_it_starts_as_peft_does_but_for_what_peft_adds():
    """PEFT multiplies ``B`` by its singular values, and ``A`` by nothing; the paper and its code do neither."""
    library = peer.peft()
    preprocess = pytest.importorskip("peft.tuners.lora.loraga").preprocess_loraga
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10))
    x, y = torch.randn(64, 16), torch.randn(64, 10)
    gradients = lr.weight_gradients(model, [(x, y)], square)
    theirs = copy.deepcopy(model)
    config = library.LoraConfig(
        r=3, lora_alpha=3, target_modules=["0", "2"], init_lora_weights="lora_ga", lora_ga_config=library.LoraGAConfig()
    )
    preprocess(theirs, config, lambda: square(theirs(x), y).backward())
    theirs = library.get_peft_model(theirs, config)
    lr.add_lora_(model, rank=3, init=lr.LoRAGA(gradients))
    for index in (0, 2):
        ours = model[index].lora_weight.adapters["default"]
        layer = theirs.base_model.model[index]
        values = torch.linalg.svdvals(gradients[f"{index}.weight"])[3:6]
        size = len(ours.B) ** 0.25 / GAMMA**0.5
        assert torch.allclose(ours.A.abs() / size, layer.lora_A["default"].weight.abs(), atol=1e-4)
        assert torch.allclose((ours.B * values).abs(), layer.lora_B["default"].weight.abs(), atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_faster_than_lora(seed):
    """On a network whose task shifts, after 30 steps of the same optimizer."""

    def after(start):
        torch.manual_seed(seed)
        model, teacher = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        x = torch.randn(256, 32)
        y = teacher(x).detach()
        gradients = lr.weight_gradients(model, [(x, y)], square)
        lr.add_lora_(model, rank=4, init=start(gradients), seed=seed)
        optimizer = torch.optim.SGD(lr.lora_parameters(model), lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            loss = square(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert after(lr.LoRAGA) < after(lambda _: "kaiming")


def test_parts_of_a_fused_attention_take_their_part_of_the_gradient():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)})
    model.forward = lambda x: model["a"](x, x, x, need_weights=False)[0]
    x = torch.randn(4, 5, 8)
    gradients = lr.weight_gradients(model, [(x, torch.randn(4, 5, 8))], square)
    lr.add_lora_(model, ["a.q_proj", "a.v_proj"], rank=2, init=lr.LoRAGA(gradients))
    for part, chunk in zip(("q", "k", "v"), gradients["a.in_proj_weight"].chunk(3), strict=True):
        if part != "k":
            a = getattr(model["a"], f"lora_{part}_proj").adapters["default"].A.detach()
            rows = torch.linalg.svd(chunk).Vh[:2]
            inside = (a / torch.linalg.vector_norm(a, dim=1, keepdim=True)) @ rows.mT
            assert torch.allclose(inside.abs(), torch.eye(2), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: None, r"LoRAGA: got gradients of type NoneType, expected weight_gradients\("),
        (lambda g: {"0.weight": g["0.weight"]}, r"LoRAGA got nothing for '\d\.weight'.*give weight_gradients\("),
        (lambda g: {k: v.mT for k, v in g.items()}, r"a tensor of shape \(8, 12\) for '0\.weight'"),
        (lambda g: {k: v * torch.nan for k, v in g.items()}, "NaN"),
    ],
)
def test_gradients_that_are_missing_or_do_not_fit(change, match):
    model, batches = classifier()
    gradients = lr.weight_gradients(model, batches, F.cross_entropy)
    keys = list(model.state_dict())
    with pytest.raises(lr.LowRankError, match=match):
        lr.add_lora_(model, rank=2, init=lr.LoRAGA(change(gradients)))
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_the_rank_is_at_most_half_of_the_smaller_side():
    model, batches = classifier()
    gradients = lr.weight_gradients(model, batches, F.cross_entropy)
    with pytest.warns(UserWarning, match=r"'4\.weight' to 2"):
        lr.add_lora_(model, rank=3, init=lr.LoRAGA(gradients))
    assert len(model[4].lora_weight.adapters["default"].A) == 2
    narrow = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    narrow_gradients = {"0.weight": torch.randn(8, 8), "1.weight": torch.randn(1, 8)}
    with pytest.raises(lr.LowRankError, match=r"2 x 1 directions.*exclude="):
        lr.add_lora_(narrow, rank=2, init=lr.LoRAGA(narrow_gradients))
    lr.add_lora_(narrow, rank=2, init=lr.LoRAGA(narrow_gradients), exclude=["1"])
    assert type(narrow[1]) is nn.Linear


@pytest.mark.parametrize("gamma", [0, -1.0, float("nan"), True, "16"])
def test_a_gamma_that_is_no_positive_number_is_refused(gamma):
    with pytest.raises(lr.LowRankError, match=r"gamma=.*positive number"):
        lr.LoRAGA({}, gamma=gamma)


def test_both_factors_shrink_with_the_root_of_gamma():
    model, batches = classifier()
    gradients, other = lr.weight_gradients(model, batches, F.cross_entropy), copy.deepcopy(model)
    lr.add_lora_(model, rank=2, init=lr.LoRAGA(gradients))
    lr.add_lora_(other, rank=2, init=lr.LoRAGA(gradients, gamma=4 * GAMMA))
    for large, small in zip(lr.lora_parameters(model), lr.lora_parameters(other), strict=True):
        assert torch.allclose(small, large / 2)


def test_a_saved_adapter_fits_the_untouched_base(tmp_path):
    model, batches = classifier()
    model.eval()
    fresh = copy.deepcopy(model)
    gradients = lr.weight_gradients(model, batches, F.cross_entropy)
    lr.add_lora_(model, rank=2, init=lr.LoRAGA(gradients))
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    lr.save_lora(model, tmp_path)
    x = batches[0][0]
    assert not torch.allclose(model(x), fresh(x), atol=1e-2)
    assert torch.allclose(lr.load_lora(fresh, tmp_path)(x), model(x), atol=1e-5)
