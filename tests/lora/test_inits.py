"""How adapters start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import lowrank_layers as lr


def model_and_stats():
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    mix = torch.randn(12, 12).triu() / 3
    batches = [torch.randn(200, 12) @ mix for _ in range(2)]
    return model, lr.calibrate(model, batches)


def test_pissa_holds_the_leading_triplets():
    model, _ = model_and_stats()
    weight = model[0].weight.detach().clone()
    lr.add_lora_(model, ["0"], rank=3, alpha=5, init="pissa")
    adapter = model[0].lora_weight.adapters["default"]
    best = lr.svd(weight, 3).to_dense()
    assert torch.allclose(adapter.scaling * adapter.B @ adapter.A, best, atol=1e-5)


def test_olora_holds_leading_columns_of_q():
    model, _ = model_and_stats()
    weight = model[0].weight.detach().clone()
    lr.add_lora_(model, ["0"], rank=3, alpha=5, init="olora")
    adapter = model[0].lora_weight.adapters["default"]
    factors = torch.linalg.qr(weight)
    assert torch.allclose(adapter.scaling * adapter.B @ adapter.A, factors.Q[:, :3] @ factors.R[:3], atol=1e-5)


@pytest.mark.parametrize("make", [lambda stats: "orthogonal", lr.EVA], ids=["orthogonal", "EVA"])
def test_rows_of_a_are_orthonormal(make):
    model, stats = model_and_stats()
    lr.add_lora_(model, rank=3, init=make(stats))
    for index in (0, 2):
        a = model[index].lora_weight.adapters["default"].A
        assert torch.allclose(a @ a.mT, torch.eye(len(a)), atol=1e-5)


def test_eva_spans_the_inputs_and_shares_the_ranks_by_explained_variance():
    model, _ = model_and_stats()
    stats = lr.calibrate(model, [torch.randn(200, 12) * torch.linspace(3, 0.1, 12)])
    lr.add_lora_(model, rank=3, init=lr.EVA(stats))
    ranks = {index: len(model[index].lora_weight.adapters["default"].A) for index in (0, 2)}
    shares = []
    for index in ranks:
        variances = torch.linalg.eigvalsh(stats[str(index)].inputs.second).flip(0)
        shares += [(float(share), index) for share in variances / variances.sum()]
    chosen = [index for _, index in sorted(shares, reverse=True)[:6]]
    assert ranks == {index: chosen.count(index) for index in (0, 2)}
    assert ranks[0] != ranks[2]
    moment = stats["0"].inputs.second.float()
    a = model[0].lora_weight.adapters["default"].A.detach()
    captured = float(torch.trace(a @ moment @ a.mT))
    best = torch.linalg.eigvalsh(moment).flip(0)[: ranks[0]].sum()
    assert captured == pytest.approx(float(best), rel=1e-4)


def test_corda_is_the_best_on_the_inputs_not_on_the_weight():
    model, stats = model_and_stats()
    weight = model[0].weight.detach().double()
    moment = stats["0"].inputs.second

    def lost(init, name):
        lr.add_lora_(model, ["0"], rank=2, init=init, name=name)
        adapter = model[0].lora_weight.adapters[name]
        return float(((weight - (adapter.scaling * adapter.B @ adapter.A).detach().double()) @ moment).norm())

    assert lost(lr.CorDA(stats), "corda") < 0.999 * lost("pissa", "pissa")


def test_a_layer_without_a_moment_is_named():
    model, stats = model_and_stats()
    wider = nn.Sequential(*model, nn.Linear(6, 6))
    for init in (lr.EVA(stats), lr.CorDA(stats)):
        with pytest.raises(lr.LowRankError, match=r"'3\.weight', and the statistics have none; give calibrate\("):
            lr.add_lora_(wider, init=init, rank=2)
    for kind in (lr.EVA, lr.CorDA):
        with pytest.raises(lr.LowRankError, match=r"got stats of type dict, expected calibrate\("):
            kind({})


@pytest.mark.parametrize(
    ("init", "match"),
    [
        ("eva", r"'eva' needs input of its own; write init=EVA\(stats\)"),
        ("corda", r"write init=CorDA\(stats\)"),
        ("lora-ga", r"write init=LoRAGA\(gradients\)"),
        ("loftq", r"write init=LoftQ\(reference\)"),
        ("magic", r"got init 'magic', expected one of \['kaiming', .*or an init such as EVA\(stats\)"),
        (lr.EVA, "got init <class"),
        (None, "got init None"),
    ],
)
def test_what_is_no_init_is_told_what_to_write(init, match):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(lr.LowRankError, match=match):
        lr.add_lora_(model, init=init)
    assert type(model[0]) is nn.Linear


class Columns(lr.LoRAInit):
    """``B`` the columns of greatest norm, ``A`` the unit vectors that choose them: a toy with all that can be said."""

    def factors(self, context):
        matrix = context.matrix
        index = matrix.norm(dim=0).topk(context.rank).indices
        return lr.LoRAFactors(torch.eye(matrix.shape[1])[index], matrix[:, index] / context.scaling, subtract=True)

    def limit(self, context):
        return context.matrix.shape[1]

    def singular_values(self, context):
        return context.matrix.norm(dim=0).sort(descending=True).values

    def ranks(self, contexts, rank):
        return [rank + k for k, _ in enumerate(contexts)]


def test_an_init_of_ones_own_decides_factors_limits_and_ranks():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.randn(3, 8)
    base = copy.deepcopy(model)
    lr.add_lora_(model, rank=2, alpha=6, init=Columns())
    first, second = (layer.lora_weight.adapters["default"] for layer in model)
    assert (len(first.A), len(second.A)) == (2, 3)
    assert torch.allclose(model(x), base(x), atol=1e-6)
    chosen = first.A.argmax(1)
    assert torch.allclose(float(first.scaling) * first.B @ first.A @ torch.eye(8)[:, chosen], base[0].weight[:, chosen])
    ruled = lr.add_lora_(base, ["0"], rank=lr.Energy(0.5), init=Columns())
    shares = ruled[0]._parameters["weight"].detach().norm(dim=0).square().sort(descending=True).values.cumsum(0)
    assert len(ruled[0].lora_weight.adapters["default"].A) == int((shares < 0.5 * shares[-1]).sum()) + 1


@pytest.mark.parametrize("factors", [{"down": torch.ones(2, 7)}, {"up": torch.ones(2, 6)}, {"up": torch.ones(6, 3)}])
def test_factors_of_another_shape_are_refused(factors):
    class Wrong(lr.LoRAInit):
        def factors(self, context):
            return lr.LoRAFactors(**factors)

    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(lr.LowRankError, match=r"gave a factor of shape .* for '0\.weight', expected \((2, 8|6, 2)\)"):
        lr.add_lora_(model, rank=2, init=Wrong())
    assert type(model[0]) is nn.Linear


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
