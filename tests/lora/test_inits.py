"""How adapters start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lowrank_layers as lr

INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda"]
FROM_ZERO = ["kaiming", "gaussian", "orthogonal", "eva"]


def model_and_stats():
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    mix = torch.randn(12, 12).triu() / 3
    batches = [torch.randn(200, 12) @ mix for _ in range(2)]
    return model, lr.calibrate(model, batches), batches[0]


@pytest.mark.parametrize("init", INITS)
def test_the_model_starts_where_its_base_is_and_disabled_is_the_base(init):
    model, stats, x = model_and_stats()
    base = model(x)
    lr.add_lora_(model, rank=3, alpha=5, init=init, stats=stats)
    assert torch.allclose(model(x), base, atol=1e-6)
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base)
    adapter = model[0].lora_weight.adapters["default"]
    assert bool(adapter.B.any()) != (init in FROM_ZERO)
    assert (adapter.a0 is None) == (init in FROM_ZERO)
    model(x).square().sum().backward()
    assert bool(adapter.B.grad.any())
    assert bool(adapter.A.grad.any()) != (init in FROM_ZERO)


def test_pissa_holds_the_leading_triplets():
    model, _, _ = model_and_stats()
    weight = model[0].weight.detach().clone()
    lr.add_lora_(model, ["0"], rank=3, alpha=5, init="pissa")
    adapter = model[0].lora_weight.adapters["default"]
    best = lr.svd(weight, 3).to_dense()
    assert torch.allclose(adapter.scaling * adapter.B @ adapter.A, best, atol=1e-5)


def test_olora_holds_leading_columns_of_q():
    model, _, _ = model_and_stats()
    weight = model[0].weight.detach().clone()
    lr.add_lora_(model, ["0"], rank=3, alpha=5, init="olora")
    adapter = model[0].lora_weight.adapters["default"]
    factors = torch.linalg.qr(weight)
    assert torch.allclose(adapter.scaling * adapter.B @ adapter.A, factors.Q[:, :3] @ factors.R[:3], atol=1e-5)


@pytest.mark.parametrize("init", ["orthogonal", "eva"])
def test_rows_of_a_are_orthonormal(init):
    model, stats, _ = model_and_stats()
    lr.add_lora_(model, rank=3, init=init, stats=stats)
    for index in (0, 2):
        a = model[index].lora_weight.adapters["default"].A
        assert torch.allclose(a @ a.mT, torch.eye(len(a)), atol=1e-5)


def test_eva_spans_the_inputs_and_shares_the_ranks_by_explained_variance():
    model, stats, _ = model_and_stats()
    lr.add_lora_(model, rank=3, init="eva", stats=stats)
    ranks = {index: len(model[index].lora_weight.adapters["default"].A) for index in (0, 2)}
    assert sum(ranks.values()) == 6
    moment = stats["0"].inputs.second.float()
    a = model[0].lora_weight.adapters["default"].A.detach()
    captured = float(torch.trace(a @ moment @ a.mT))
    best = torch.linalg.eigvalsh(moment).flip(0)[: ranks[0]].sum()
    assert captured == pytest.approx(float(best), rel=1e-4)


def test_corda_is_the_best_on_the_inputs_not_on_the_weight():
    model, stats, _ = model_and_stats()
    weight = model[0].weight.detach().double()
    moment = stats["0"].inputs.second

    def lost(init):
        lr.add_lora_(model, ["0"], rank=2, init=init, stats=stats, name=init)
        adapter = model[0].lora_weight.adapters[init]
        return float(((weight - (adapter.scaling * adapter.B @ adapter.A).detach().double()) @ moment).norm())

    assert lost("corda") < 0.999 * lost("pissa")


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_moments_are_asked_for(init):
    model, _, _ = model_and_stats()
    with pytest.raises(lr.LowRankError, match=f"{init}.*stats=calibrate"):
        lr.add_lora_(model, init=init, rank=2)


def test_a_seed_gives_the_same_values():
    models = [nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]
    for model in models:
        lr.add_lora_(model, rank=2, seed=3)
    assert torch.equal(*[model[0].lora_weight.adapters["default"].A for model in models])


def train(model, parameters, x, y, steps, rate):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return F.cross_entropy(model(x), y).item()


@pytest.fixture(scope="module")
def odd_digits():
    """A 64-128-16 network that knows the odd digits, and the even ones (the setting of Meng et al., 2024)."""
    data = load_digits()
    x, y = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    odd = y % 2 == 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    train(model, model.parameters(), x[odd], y[odd], 500, 3e-3)
    return model, x[~odd], y[~odd]


@pytest.mark.parametrize("seed", range(3))
def test_after_50_steps_pissa_has_at_most_half_of_lora_s_loss(odd_digits, seed):
    base, x, y = odd_digits

    def best(init):
        losses = []
        for rate in (3e-3, 1e-2, 3e-2):
            model = lr.add_lora_(copy.deepcopy(base), rank=8, alpha=8, init=init, seed=seed)
            losses.append(train(model, lr.lora_parameters(model), x, y, 50, rate))
            with lr.lora_disabled(model):
                assert torch.equal(model(x), base(x))
        return min(losses)

    assert best("pissa") <= best("kaiming") / 2


def test_extracted_adapters_keep_what_a_fine_tune_gained(odd_digits):
    base, x, y = odd_digits
    tuned = copy.deepcopy(base)
    before = F.cross_entropy(base(x), y).item()
    after = train(tuned, tuned.parameters(), x, y, 100, 3e-3)
    extracted = lr.extract_lora(base, tuned, rank=8).apply_(copy.deepcopy(base))
    reached = F.cross_entropy(extracted(x), y).item()
    assert before - reached >= 0.96 * (before - after)
