"""Bad input is refused with what was got and what to do, and leaves the model bit-identical."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowrank_layers as lr


def model():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(2, 8, 3, padding=1))
    net.add_module("norm", nn.BatchNorm2d(8))
    net.add_module("flat", nn.Flatten())
    net.add_module("fc1", nn.Linear(8 * 36, 24))
    net.add_module("fc2", nn.Linear(24, 5))
    return net.eval()


DATA = [torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))]


def stats_of(net):
    return lr.calibrate(net, DATA, loss=lr.SampledCrossEntropy())


def other():
    return nn.Sequential(nn.Linear(6, 6))


def spoiled(value):
    net = model()
    with torch.no_grad():
        net.fc1.weight[0, 0] = value
    return net


def plan_of(net, **kwargs):
    return lr.make_plan(net, rank=2, **kwargs)


def edited(change):
    plan = plan_of(model())
    change(plan)
    return plan


def factorize_twice(net):
    plan = plan_of(net)
    lr.factorize_(lr.factorize_(copy.deepcopy(net), plan), plan)


def distributed(net):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(net)


def integer():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


def subclass():
    class Custom(nn.Linear):
        pass

    return Custom(4, 4)


def nan_layer(layer):
    with torch.no_grad():
        layer.weight.view(-1)[0] = float("nan")
    return layer


def generator_of_nothing():
    yield from ()


T = torch.randn(8, 6, 3, 3)
L, C, E = lr.LowRankLinear, lr.LowRankConv2d, lr.LowRankEmbedding

# what is tried, and a word that the message must have
VALUES = {
    # factorizations
    "svd of NaN": (lambda: lr.svd(torch.full((3, 3), float("nan"))), "svd: got NaN"),
    "svd of Inf": (lambda: lr.svd(torch.full((3, 3), float("inf"))), "svd: got NaN or Inf"),
    "svd of integers": (lambda: lr.svd(torch.ones(3, 3, dtype=torch.int64)), "float"),
    "svd of a vector": (lambda: lr.svd(torch.ones(3)), "dimensions"),
    "svd of nothing": (lambda: lr.svd(torch.ones(0, 3)), "empty"),
    "svd on meta": (lambda: lr.svd(torch.ones(3, 3, device="meta")), "meta"),
    "tucker of sparse": (lambda: lr.tucker(torch.eye(3).to_sparse(), (1, 1)), "to_dense"),
    "svd of a list": (lambda: lr.svd([[1.0]]), "torch.Tensor"),
    "svd of complex": (lambda: lr.svd(torch.ones(3, 3, dtype=torch.complex64)), "floating-point"),
    "svd rank 0": (lambda: lr.svd(torch.eye(3), 0), "rank 0"),
    "svd rank half": (lambda: lr.svd(torch.eye(3), 0.5), "rank 0.5"),
    "svd rank True": (lambda: lr.svd(torch.eye(3), True), "rank True"),
    "svd method": (lambda: lr.svd(torch.eye(3), 1, method="magic"), "magic"),
    "tucker too few ranks": (lambda: lr.tucker(T, (2, 2)), "4 modes"),
    "tucker one integer": (lambda: lr.tucker(T, 3), "one entry per mode"),
    "tucker negative": (lambda: lr.tucker(T, (2, -1, None, None)), "-1"),
    "tucker fractions": (lambda: lr.tucker(T, (0.5, 0.5, None, None)), "0.5"),
    "cp rank 0": (lambda: lr.cp(T, 0), "rank 0"),
    "cp no sweeps": (lambda: lr.cp(T, 2, sweeps=0), "sweeps"),
    "nmf of negative entries": (lambda: lr.nmf(torch.tensor([[1.0, -2.0]]), 1), "negative entry (-2)"),
    "nmf kl by hals": (lambda: lr.nmf(torch.eye(3), 1, loss="kl"), "expected solver 'mu'"),
    "truncate to 0": (lambda: lr.svd(torch.eye(3)).truncate(0), "rank=0"),
    "error of another shape": (lambda: lr.svd(torch.eye(3)).relative_error(torch.eye(4)), "shape"),
    # rank rules
    "fraction 0": (lambda: lr.ParameterFraction(0), "ParameterFraction"),
    "fraction 1.5": (lambda: lr.ParameterFraction(1.5), "1.5"),
    "fraction text": (lambda: lr.ParameterFraction("half"), "half"),
    "energy NaN": (lambda: lr.Energy(float("nan")), "Energy"),
    "relative error 1": (lambda: lr.RelativeError(1.0), "RelativeError"),
    "rule class instead of rule": (lambda: L.from_dense(nn.Linear(4, 4), rank=lr.Energy), "Call the rule"),
    "rule returns 0": (lambda: L.from_dense(nn.Linear(4, 4), rank=lambda spectrum: 0), "returned 0"),
    "rule returns a float": (lambda: L.from_dense(nn.Linear(4, 4), rank=lambda spectrum: 1.5), "returned 1.5"),
    "spectrum rule without weights": (lambda: L(4, 4, rank=lr.Energy(0.9)), "singular values"),
    "spectrum rule for CP": (lambda: lr.CPConv2d.from_dense(nn.Conv2d(2, 2, 3), rank=lr.EVBMF()), "CPConv2d"),
    # layers
    "layer rank 0": (lambda: L(4, 4, rank=0), "LowRankLinear"),
    "layer rank float": (lambda: L(4, 4, rank=0.3), "ParameterFraction(0.3)"),
    "layer rank None": (lambda: L(4, 4, rank=None), "None"),
    "layer of NaN": (lambda: L.from_dense(nan_layer(nn.Linear(4, 4)), rank=1), "NaN"),
    "layer of integers": (lambda: L.from_dense(integer(), rank=1), "dequantize"),
    "layer on meta": (lambda: L.from_dense(nn.Linear(4, 4, device="meta"), rank=1), "meta"),
    "layer of another kind": (lambda: L.from_dense(nn.Conv2d(2, 2, 1), rank=1), "Conv2d"),
    "layer of a subclass": (lambda: L.from_dense(subclass(), rank=1), "Custom"),
    "layer twice": (lambda: L.from_dense(L(4, 4, rank=2), rank=1), "once"),
    "lazy layer": (lambda: L.from_dense(nn.LazyLinear(4), rank=1), "one batch"),
    "weight norm": (
        lambda: L.from_dense(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), rank=1),
        "LowRankLinear",
    ),
    "groups that do not divide": (lambda: C(4, 4, 3, groups=3, rank=1), "groups"),
    "conv mode": (lambda: C(4, 4, 3, rank=1, mode="magic"), "'channel' or 'spatial'"),
    "transposed with reflect": (lambda: lr.LowRankConvTranspose2d(4, 4, 3, padding_mode="reflect", rank=1), "zeros"),
    "bag of maxima": (lambda: lr.LowRankEmbeddingBag(9, 4, mode="max", rank=1), "mode='max'"),
    "from bag of maxima": (
        lambda: lr.LowRankEmbeddingBag.from_dense(nn.EmbeddingBag(9, 4, mode="max"), rank=1),
        "mode='max'",
    ),
    "tucker three ranks": (lambda: lr.TuckerConv2d(4, 4, 3, rank=(1, 2, 3)), "rank_out"),
    "conv1d": (lambda: C.from_dense(nn.Conv1d(2, 2, 3), rank=1), "Conv1d"),
    "transposed": (lambda: C.from_dense(nn.ConvTranspose2d(2, 2, 3), rank=1), "ConvTranspose2d"),
    "embedding of an EmbeddingBag": (lambda: E.from_dense(nn.EmbeddingBag(5, 4), rank=1), "EmbeddingBag"),
    # budgets
    "budget of nothing": (lambda: lr.Budget(), "one or more"),
    "budget 0": (lambda: lr.Budget(params=0), "params=0"),
    "budget 1.5": (lambda: lr.Budget(params=1.5), "1.5"),
    "budget negative": (lambda: lr.Budget(bytes=-4), "-4"),
    "budget True": (lambda: lr.Budget(params=True), "True"),
    "budget NaN": (lambda: lr.Budget(params=float("nan")), "nan"),
    "temperature 0": (lambda: lr.SampledCrossEntropy(temperature=0), "temperature"),
    "save nowhere": (lambda: lr.save(model(), "/no/such/folder/x.safetensors"), "does not exist"),
    "save a meta model": (lambda: lr.save(nn.Linear(2, 2, device="meta"), "x.safetensors"), "meta"),
    "save no model": (lambda: lr.save({"a": torch.ones(2)}, "x.safetensors"), "torch.nn.Module"),
    "plan of no file": (lambda: lr.Plan.load("/no/such/plan.json"), "plan.json"),
}

# what is tried on a model, and a word that the message must have
ON_A_MODEL = {
    "budget nobody can reach": (lambda m: lr.make_plan(m, lr.Budget(params=3)), "smallest this model can become"),
    "budget as a float": (lambda m: lr.make_plan(m, 0.3), "Budget(params=0.3)"),
    "neither budget nor rank": (lambda m: lr.make_plan(m), "budget"),
    "both": (lambda m: lr.make_plan(m, lr.Budget(params=0.5), rank=3), "either"),
    "MACs without statistics": (lambda m: lr.make_plan(m, lr.Budget(macs=0.5)), "calibrate"),
    "unmatched skip": (lambda m: plan_of(m, skip=["fc9"]), "'fc9'"),
    "skip close to a name": (lambda m: plan_of(m, skip=["fc3"]), "Did you mean"),
    "skip as one string": (lambda m: plan_of(m, skip="fc1"), "['fc1']"),
    "skip of a number": (lambda m: plan_of(m, skip=[3]), "3"),
    "everything skipped": (lambda m: plan_of(m, skip=[nn.Linear, nn.Conv2d]), "nothing to factorize"),
    "no methods": (lambda m: plan_of(m, methods=[]), "methods"),
    "a method's class": (lambda m: plan_of(m, methods=[lr.SVDMethod]), "SVDMethod()"),
    "units": (lambda m: lr.make_plan(m, lr.Budget(params=0.5), units="metric"), "metric"),
    "rank 0": (lambda m: lr.make_plan(m, rank=0), "rank 0"),
    "statistics of another model": (lambda m: plan_of(m, stats=lr.calibrate(other(), [torch.ones(2, 6)])), "'0'"),
    "statistics of another width": (
        lambda m: plan_of(m, stats=lr.Statistics({"fc2": lr.calibrate(other(), [torch.randn(2, 6)])["0"]})),
        "6 inputs for a layer of 24",
    ),
    "statistics as a dict": (lambda m: plan_of(m, stats={"fc1": None}), "calibrate returned"),
    "the root as a target": (lambda m: lr.make_plan(m.fc1, rank=2), "nn.Sequential"),
    "DataParallel": (lambda m: plan_of(nn.DataParallel(m)), "model.module"),
    "DDP": (lambda m: plan_of(distributed(m)), "model.module"),
    "DDP inside": (lambda m: plan_of(nn.Sequential(distributed(m))), "before wrapping"),
    "DDP factorize": (lambda m: lr.factorize_(distributed(m), plan_of(model())), "model.module"),
    "compiled": (lambda m: plan_of(torch.compile(m)), "_orig_mod"),
    "scripted": (lambda m: plan_of(torch.jit.trace(m, DATA[0])), "scripted"),
    "no model": (lambda m: lr.make_plan("resnet18", rank=2), "torch.nn.Module"),
    "plan for another model": (lambda m: lr.factorize_(m, plan_of(other())), "another model"),
    "plan with other shapes": (lambda m: lr.factorize_(m, plan_of(nn.ModuleDict({"fc1": nn.Linear(9, 9)}))), "'fc1'"),
    "no plan": (lambda m: lr.factorize_(m, 0.3), "make_plan"),
    "plan edited: unknown layer": (lambda m: edited(lambda p: p.set_rank("fc7", 2)), "fc7"),
    "plan edited: rank 0": (lambda m: edited(lambda p: p.set_rank("fc1", 0)), "rank 0"),
    "plan edited: wrong method": (lambda m: edited(lambda p: p.set_rank("fc1", 2, method="cp")), "'cp'"),
    "plan edited: unknown drop": (lambda m: edited(lambda p: p.drop("head")), "head"),
    "factorized twice": (factorize_twice, "factored already"),
    "statistics do not know a layer": (
        lambda m: lr.factorize_(m, plan_of(m), stats=lr.Statistics(dict(list(stats_of(m).items())[:1]))),
        "calibrate this model",
    ),
    "no optimizer": (lambda m: lr.factorize_(m, plan_of(m), optimizer="adam"), "torch.optim"),
    "no data": (lambda m: lr.factorize_(m, plan_of(m), data=[]), "no batches"),
    "empty generator": (lambda m: lr.factorize_(m, plan_of(m), data=generator_of_nothing()), "no batches"),
    "data of another kind": (
        lambda m: lr.factorize_(m, plan_of(m), stats=stats_of(m), data=["text"]),
        "batch of type str",
    ),
    "data with NaN": (
        lambda m: lr.factorize_(m, plan_of(m), stats=stats_of(m), data=[DATA[0] * float("nan")]),
        "NaN",
    ),
    "calibrate on nothing": (lambda m: lr.calibrate(m, []), "batches is empty"),
    "calibrate on one tensor": (lambda m: lr.calibrate(m, DATA[0]), "[batch]"),
    "calibrate on text": (lambda m: lr.calibrate(m, ["text"]), "batch of type str"),
    "calibrate on NaN": (lambda m: lr.calibrate(m, [DATA[0] * float("nan")]), "'conv'"),
    "calibrate DDP": (lambda m: lr.calibrate(distributed(m), DATA), "model.module"),
    "calibrate with a bad loss": (
        lambda m: lr.calibrate(m, DATA, loss=lambda out, y: lr.SampledCrossEntropy()(out.sum(), y)),
        "returned a tensor [], expected logits of at least 2 dimensions",
    ),
    "a loss that is a float": (lambda m: lr.calibrate(m, DATA, loss=lambda out, y: 1.0), "returned float"),
    "a loss that is no scalar": (lambda m: lr.calibrate(m, DATA, loss=lambda out, y: out), "shape (16, 5)"),
    "a detached loss": (lambda m: lr.calibrate(m, DATA, loss=lambda out, y: out.detach().sum()), "depends on"),
    "sample labels of no logits": (
        lambda m: lr.calibrate(m, DATA, loss=lambda out, y: lr.SampledCrossEntropy()({"a": out}, y)),
        "logits",
    ),
    "load no file": (lambda m: lr.load("/no/such/file", into=m), "no such file"),
    "load into nothing": (lambda m: lr.load("/no/such/file", into=None), "torch.nn.Module"),
}


@pytest.fixture(autouse=True)
def _no_process_group_left():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def assert_explains(error, word):
    """The message has the word, is made of whole sentences, and comes without a trace of what failed inside."""
    message = str(error)
    assert word in message
    assert message.endswith((".", "?"))
    assert len(message.split()) >= 5
    assert error.__cause__ is None or error.__suppress_context__


@pytest.mark.parametrize("case", VALUES)
def test_bad_values_are_refused(case):
    attempt, word = VALUES[case]
    with pytest.raises(lr.LowRankError) as caught:
        attempt()
    assert_explains(caught.value, word)


@pytest.mark.parametrize("case", ON_A_MODEL)
def test_bad_calls_leave_the_model_bit_identical(case):
    attempt, word = ON_A_MODEL[case]
    net = model()
    before = copy.deepcopy(net.state_dict())
    kinds = [type(m) for m in net.modules()]
    flags = [m.training for m in net.modules()]
    with pytest.raises(lr.LowRankError) as caught:
        attempt(net)
    assert_explains(caught.value, word)
    assert [type(m) for m in net.modules()] == kinds
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("with_stats", [False, True])
def test_weights_that_are_not_finite_are_named(value, with_stats):
    """The plan was made before the weight broke."""
    sound = model()
    stats = stats_of(sound) if with_stats else None
    plan = plan_of(sound, stats=stats)
    broken = spoiled(value)
    before = copy.deepcopy(broken.state_dict())
    with pytest.raises(lr.LowRankError, match=r"'fc1'.*NaN"):
        lr.factorize_(broken, plan, stats=stats, data=DATA if with_stats else None)
    assert all(torch.equal(before[k], v) for k, v in broken.state_dict().items() if k != "fc1.weight")
    assert type(broken.conv) is nn.Conv2d


def test_a_layer_that_fails_half_way_leaves_the_model_whole(monkeypatch):
    net = model()
    plan = plan_of(net)
    before = copy.deepcopy(net.state_dict())
    build = lr.SVDMethod.build
    calls = []

    def fail_at_the_second(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise lr.LowRankError("the decomposition did not converge")
        return build(self, *args)

    monkeypatch.setattr(lr.SVDMethod, "build", fail_at_the_second)
    for data in (None, DATA):
        calls.clear()
        with pytest.raises(lr.LowRankError, match=r"'fc1': the decomposition"):
            lr.factorize_(net, plan, data=data)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
