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
