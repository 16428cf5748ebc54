import copy
from functools import partial

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import replace_


def test_optimizer_groups_follow_the_layers():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].bias]["momentum_buffer"].clone()
    lr.factorize_(model, lr.make_plan(model, rank=2, skip=["1"]), optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model[0].parameters()}
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(optimizer.state[model[0].up.bias]["momentum_buffer"], momentum)
    before = copy.deepcopy(model[0].down.weight)
    optimizer.zero_grad()
    model(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].down.weight)


def decay_groups(model):
    """Weights with weight decay, biases without: the usual two groups."""
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]


@pytest.mark.parametrize("back", [False, True], ids=["factorize", "densify"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 3)),
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)),
    ],
    ids=["layers", "attention"],
)
def test_weights_and_biases_in_two_groups_stay_there(build, back):
    model = build()
    optimizer = torch.optim.SGD(decay_groups(model), lr=0.1)
    lr.factorize_(model, lr.make_plan(model, rank=2), optimizer=optimizer)
    if back:
        lr.densify_(model, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})  # else a step would be taken twice
    for group, expected in zip(optimizer.param_groups, decay_groups(model), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in expected["params"]}


def test_replace_leaves_frozen_parameters_out():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    replace_(model, {"0": lr.LowRankLinear(4, 4, rank=1)}, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, amsgrad=True),
}
ATTENTIONS = {
    "fused": lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0),
    "no bias": lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, bias=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("build", ATTENTIONS.values(), ids=ATTENTIONS)
def test_an_attention_trains_on_as_if_it_had_not_been_opened_and_closed(build, optimizer):
    """The state of the fused projections is split and joined again: every step is the one that torch's layer makes."""
    plain = nn.Sequential(build()).double()
    x = torch.randn(4, 3, 8).double()
    before = optimizer(plain.parameters())
    step(plain, before, x)
    ours = copy.deepcopy(plain)
    known = optimizer(ours.parameters())
    known.load_state_dict(copy.deepcopy(before.state_dict()))
    opened = lr.LowRankMultiheadAttention.from_dense(ours[0].self_attn, rank=None)
    replace_(ours, {"0.self_attn": opened}, known)
    for _ in range(2):
        step(plain, before, x)
        step(ours, known, x)
    assert ours[0].self_attn is opened
    assert torch.allclose(ours(x), plain(x), rtol=1e-10)
    lr.densify_(ours, optimizer=known)
    step(plain, before, x)
    step(ours, known, x)
    assert type(ours[0].self_attn) is nn.MultiheadAttention
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in pairs)


def test_separate_sizes_of_keys_and_values_keep_their_state():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    model = nn.ModuleList([attention])
    optimizer = torch.optim.Adam(model.parameters())
    attention(torch.randn(3, 8), torch.randn(5, 6), torch.randn(5, 4))[0].sum().backward()
    optimizer.step()
    expected = optimizer.state[attention.k_proj_weight]["exp_avg"].clone()
    replace_(model, {"0": lr.LowRankMultiheadAttention.from_dense(attention, rank=None)}, optimizer)
    assert torch.equal(optimizer.state[model[0].k_proj.weight]["exp_avg"], expected)
    steps = [state["step"] for state in optimizer.state.values()]
    assert len({id(each) for each in steps}) == len(steps)  # else a step would count several times


def test_a_factored_bias_and_its_dense_one_keep_their_state_both_ways():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, torch.randn(2, 4, 5, 5))
    expected = optimizer.state[model[0].bias]["exp_avg"].clone()
    lr.factorize_(model, lr.make_plan(model, rank=2, methods=[lr.CPMethod()]), optimizer=optimizer)
    assert torch.equal(optimizer.state[model[0].bias]["exp_avg"], expected)
    assert list(optimizer.state) == [model[0].bias]  # factors start without
    lr.densify_(model, optimizer=optimizer)
    assert torch.equal(optimizer.state[model[0].bias]["exp_avg"], expected)
    assert list(optimizer.state) == [model[0].bias]


def test_a_child_that_stays_keeps_its_place_and_state():
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.inner(x)

    model = nn.Sequential(Wrapped(nn.Linear(3, 4)))
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, torch.randn(2, 3))
    inner = model[0].inner
    states = {parameter: optimizer.state[parameter] for parameter in inner.parameters()}
    scale = optimizer.state[model[0].scale]["exp_avg_sq"]
    replace_(model, {"0": Wrapped(inner)}, optimizer)
    assert all(optimizer.state[parameter] is state for parameter, state in states.items())
    assert torch.equal(optimizer.state[model[0].scale]["exp_avg_sq"], scale)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


def test_the_names_of_parameters_follow():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    lr.factorize_(model, lr.make_plan(model, rank=2), optimizer=optimizer)
    group = optimizer.param_groups[0]
    named = dict(zip(group["param_names"], group["params"], strict=True))
    assert named == dict(model.named_parameters())


def test_a_state_that_does_not_follow_the_shape_is_dropped():
    """Adafactor keeps the sums of rows and columns of a matrix."""
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleList([attention])
    optimizer = torch.optim.Adafactor(model.parameters())
    attention(*torch.randn(3, 5, 8))[0].sum().backward()
    optimizer.step()
    kept = optimizer.state[attention.out_proj.weight]
    replace_(model, {"0": lr.LowRankMultiheadAttention.from_dense(attention, rank=None)}, optimizer)
    assert model[0].q_proj.weight not in optimizer.state
    assert optimizer.state[model[0].out_proj.weight].keys() == kept.keys()
    attention = model[0]
    attention(*torch.randn(3, 5, 8))[0].sum().backward()
    optimizer.step()


@pytest.mark.parametrize("act", [lambda m, o: lr.factorize_(m, lr.make_plan(m, rank=1), optimizer=o), lr.densify_])
def test_what_is_no_optimizer_is_refused(act):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(lr.LowRankError, match="got optimizer of type dict"):
        act(model, {})
    with pytest.raises(lr.LowRankError, match=r"got LBFGS.*make a new one afterwards"):
        act(model, torch.optim.LBFGS(model.parameters()))
    assert type(model[0]) is nn.Linear


PAIRS = {
    "linear": (lambda: nn.Linear(9, 7), (5, 9), lr.LowRankLinear.from_dense),
    "conv": (lambda: nn.Conv2d(3, 7, 3, bias=False), (5, 3, 6, 6), lr.LowRankConv2d.from_dense),
    "spatial": (lambda: nn.Conv2d(3, 7, 3), (5, 3, 6, 6), partial(lr.LowRankConv2d.from_dense, mode="spatial")),
    "embedding": (lambda: nn.Embedding(9, 7), None, lr.LowRankEmbedding.from_dense),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_the_momentum_of_truncated_factors_is_their_gradient(kind):
    """What is truncated is zero here, so that the gradient of the weight is the same before and after."""
    build, shape, factorized = PAIRS[kind]
    dense = factorized(build().double(), rank=3).to_dense()  # of rank 3
    old, new = nn.Sequential(factorized(dense, rank=6)), factorized(dense, rank=3)
    x = torch.arange(9) if shape is None else torch.randn(shape, dtype=torch.float64)
    optimizer = torch.optim.Adam(old.parameters(), lr=0.0, betas=(0.0, 0.0), amsgrad=True)
    step(old, optimizer, x)
    replace_(old, {"0": new}, optimizer)
    old.zero_grad()
    old(x).square().sum().backward()
    for parameter in new.parameters():
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], parameter.grad, rtol=1e-9, atol=1e-9)
        assert bool((optimizer.state[parameter]["exp_avg_sq"] >= 0).all())
    step(old, optimizer, x)


def test_second_moments_of_truncated_factors_are_those_of_independent_gradients():
    """With gradients of independent signs, the mean square of a sum is the sum of the mean squares."""
    old = nn.Sequential(lr.LowRankLinear(6, 5, rank=4)).double()
    new = lr.LowRankLinear(6, 5, rank=2).double()
    mixing = torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        new.up.weight.copy_(old[0].up.weight @ mixing)
        new.down.weight.copy_(mixing.T @ old[0].down.weight)
    optimizer = torch.optim.Adam(old.parameters(), lr=0.0)
    step(old, optimizer, torch.randn(3, 6, dtype=torch.float64))
    squares = [optimizer.state[part.weight]["exp_avg_sq"].clone() for part in (old[0].down, old[0].up)]
    replace_(old, {"0": new}, optimizer)
    torch.testing.assert_close(optimizer.state[new.down.weight]["exp_avg_sq"], mixing.T.square() @ squares[0])
    torch.testing.assert_close(optimizer.state[new.up.weight]["exp_avg_sq"], squares[1] @ mixing.square())


def test_factors_of_another_form_start_without_a_state():
    pairs = [
        (lr.LowRankConv2d(4, 4, 3, rank=2), lr.LowRankConv2d(4, 4, 3, rank=2, mode="spatial")),
        (lr.LowRankConv2d(4, 4, 3, rank=2, groups=2), lr.LowRankConv2d(4, 4, 3, rank=1, groups=2)),
        (lr.CPConv2d(4, 4, 3, rank=3), lr.CPConv2d(4, 4, 3, rank=2)),
    ]
    for old, new in pairs:
        model = nn.Sequential(old)
        optimizer = torch.optim.Adam(model.parameters())
        step(model, optimizer, torch.randn(2, 4, 5, 5))
        replace_(model, {"0": new}, optimizer)
        assert list(optimizer.state) == [new.bias]
    model = nn.Sequential(lr.LowRankLinear(4, 4, rank=3))
    optimizer = torch.optim.Adadelta(model.parameters())  # squares of updates, which have another unit
    step(model, optimizer, torch.randn(2, 4))
    replace_(model, {"0": lr.LowRankLinear(4, 4, rank=2)}, optimizer)
    assert list(optimizer.state) == [model[0].up.bias]
