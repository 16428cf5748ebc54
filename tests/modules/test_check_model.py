import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lowrank_layers as lr


def factored():
    return nn.Sequential(lr.LowRankLinear(8, 8, rank=2), nn.Linear(8, 4))


CHANGED = {
    "pruned": lambda model: prune.l1_unstructured(model[0].up, "weight", 0.5),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model[0].up),
    "quantized": lambda model: model[0].add_module(
        "up", torch.ao.nn.quantized.dynamic.Linear.from_float(prepared(model[0].up))
    ),
}


def prepared(linear: nn.Linear) -> nn.Linear:
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return linear


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("how", CHANGED)
def test_factors_that_are_no_parameters_are_refused_by_name(how, tmp_path):
    model = factored()
    CHANGED[how](model)
    for act in (lr.densify_, lr.Plan.from_model, lambda m: lr.save(m, tmp_path / "x.safetensors")):
        with pytest.raises(lr.LowRankError, match=r"'0'.*'up'.*fold"):
            act(model)
    assert not list(tmp_path.iterdir())


def test_tensor_subclasses_are_refused_by_name():
    class Sharded(torch.Tensor):
        pass

    model = factored()
    model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Sharded))
    assert type(model[1].weight) is Sharded
    for act in (lr.densify_, lr.Plan.from_model, lambda m: lr.make_plan(m, rank=1)):
        with pytest.raises(lr.LowRankError, match=r"'1\.weight' is a Sharded.*before sharding"):
            act(model)


LAZY = {
    "linear": lambda: nn.LazyLinear(4),
    "convolution": lambda: nn.LazyConv2d(4, 3),
    "batch norm": lambda: nn.LazyBatchNorm1d(affine=False),
}


@pytest.mark.parametrize("layer", LAZY.values(), ids=LAZY)
def test_lazy_modules_are_refused_by_everything_with_the_remedy(layer, tmp_path):
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    plan = lr.make_plan(dense, rank=2)
    lr.save(dense, tmp_path / "dense.safetensors")
    acts = [
        lambda m: lr.make_plan(m, rank=2),
        lambda m: lr.factorize_(m, plan),
        lr.densify_,
        lr.Plan.from_model,
        lambda m: lr.save(m, tmp_path / "lazy.safetensors"),
        lambda m: lr.load(tmp_path / "dense.safetensors", into=m),
        lambda m: lr.calibrate(m, [torch.randn(4, 8)]),
        lambda m: lr.add_lora_(m, rank=2),
    ]
    for act in acts:
        model = nn.Sequential(nn.Linear(8, 8), layer())
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(lr.LowRankError, match=r"'1\..*' is not initialized yet.*run one batch"):
            act(model)
        assert [type(module) for module in model.modules()] == kinds
        assert "weight" in model[0]._parameters
    assert [file.name for file in tmp_path.iterdir()] == ["dense.safetensors"]


WRAPPED = {
    "no module": (lambda: [nn.Linear(4, 4)], "got list, expected a torch.nn.Module"),
    "data parallel": (lambda: nn.DataParallel(factored()), "wrapped in DataParallel; pass model.module"),
    "data parallel inside": (lambda: nn.Sequential(nn.DataParallel(factored())), "'0' is wrapped in DataParallel"),
    "compiled": (lambda: torch.compile(factored()), "a compiled model; pass model._orig_mod"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), "a scripted model"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(("build", "message"), WRAPPED.values(), ids=WRAPPED)
def test_what_cannot_be_changed_in_place_is_refused(build, message):
    for act in (lr.densify_, lambda m: lr.make_plan(m, rank=1)):
        with pytest.raises(lr.LowRankError, match=message):
            act(build())


def hook_up(model: nn.Module) -> None:
    model[0].up.register_forward_hook(lambda *_: None)


def change_forward(model: nn.Module) -> None:
    model[0].forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_up, "'0', Linear inside: cannot be multiplied out: it carries hooks"),
        (change_forward, "'0': .*its forward"),
    ],
)
def test_multiplying_out_refuses_what_it_would_lose(change, message):
    model = factored()
    change(model)
    with pytest.raises(lr.LowRankError, match=message):
        lr.densify_(model)
    assert isinstance(model[0], lr.LowRankLinear)
