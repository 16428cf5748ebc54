"""``LowRankTransposedLinear``, the pair in the place of transformers' ``Conv1D``, against the ``Conv1D``."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.layers.transposed_linear import LowRankTransposedLinear

from ..contracts.tables import BAD_RANKS, HALF_TOLERANCE, relative

transformers = pytest.importorskip("transformers")

TIGHT = 1e-5
INTO, OUT = 7, 10


def conv1d(into: int = INTO, out: int = OUT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Conv1D with a bias that is not zero."""
    dense = transformers.pytorch_utils.Conv1D(out, into)
    nn.init.normal_(dense.weight)
    nn.init.normal_(dense.bias)
    return dense.to(dtype)


def gpt2(**more) -> nn.Module:
    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # transformers imports it where it is installed
    torch.manual_seed(5)
    settings = {"vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    config = transformers.GPT2Config(**{**settings, "bos_token_id": 0, "eos_token_id": 0, **more})
    return transformers.GPT2LMHeadModel(config).eval()


def tokens(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (count, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=x).logits


# ------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("lead", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize(("into", "out"), [(INTO, OUT), (OUT, INTO), (13, 11), (5, 1)])
def test_full_rank_computes_what_conv1d_computes(lead, into, out):
    dense = conv1d(into, out)
    layer = LowRankTransposedLinear.from_dense(dense, rank=1000)
    assert layer.rank == min(into, out)
    x = torch.randn(*lead, into)
    assert layer(x).shape == (*lead, out)
    assert relative(layer(x), dense(x)) < TIGHT
    assert relative(layer.weight, dense.weight) < TIGHT
    assert torch.equal(layer.bias, dense.bias)


def test_the_weight_has_the_shape_of_the_dense_one_and_not_of_a_linear_layers():
    dense = conv1d()
    for layer in (LowRankTransposedLinear.from_dense(dense, rank=3), LowRankTransposedLinear(INTO, OUT, rank=3)):
        assert layer.weight.shape == dense.weight.shape == (INTO, OUT)
        assert layer.down.weight.shape == (3, INTO)
        assert layer.up.weight.shape == (OUT, 3)
        assert layer.factors().to_dense().shape == (INTO, OUT)
        assert relative(layer.factors().to_dense(), layer.weight) < TIGHT


def test_the_error_is_the_tail_of_the_singular_values():
    dense = conv1d(dtype=torch.float64)
    values = torch.linalg.svdvals(dense.weight.detach())
    for rank in range(1, INTO + 1):
        layer = LowRankTransposedLinear.from_dense(dense, rank=rank)
        tail = float(torch.linalg.vector_norm(values[rank:]) / torch.linalg.vector_norm(values))
        assert relative(layer.weight, dense.weight) == pytest.approx(tail, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("rank", [2, 1000])
def test_the_way_back_is_a_conv1d_that_computes_the_same(rank):
    dense = conv1d()
    layer = LowRankTransposedLinear.from_dense(dense, rank=rank)
    back = layer.to_dense()
    assert type(back) is transformers.pytorch_utils.Conv1D
    assert (back.nf, back.nx) == (OUT, INTO)
    assert list(back.state_dict()) == list(dense.state_dict())
    x = torch.randn(3, INTO)
    assert relative(back(x), layer(x)) < TIGHT
    assert torch.equal(back.weight, layer.weight)
    owners = [{p.untyped_storage().data_ptr() for p in module.parameters()} for module in (dense, layer, back)]
    assert not owners[0] & owners[1]
    assert not owners[1] & owners[2]


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=str)
def test_half_precision(dtype):
    dense = conv1d(dtype=dtype)
    layer = LowRankTransposedLinear.from_dense(dense, rank=1000)
    back = layer.to_dense()
    assert {p.dtype for p in [*layer.parameters(), *back.parameters()]} == {dtype}
    assert relative(layer.weight, dense.weight) < HALF_TOLERANCE[dtype]


def test_mode_and_gradient_flags_are_kept():
    for training in (True, False):
        for weight_learns in (True, False):
            for bias_learns in (True, False):
                dense = conv1d().train(training)
                dense.weight.requires_grad_(weight_learns)
                dense.bias.requires_grad_(bias_learns)
                layer = LowRankTransposedLinear.from_dense(dense, rank=2)
                back = layer.to_dense()
                assert layer.training == layer.down.training == back.training == training
                assert layer.down.weight.requires_grad == layer.up.weight.requires_grad == weight_learns
                assert layer.up.bias.requires_grad == back.bias.requires_grad == bias_learns
                assert back.weight.requires_grad == weight_learns


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_clones_compute_the_same(clone):
    layer = LowRankTransposedLinear.from_dense(conv1d(), rank=2)
    x = torch.randn(3, INTO)
    assert torch.equal(clone(layer)(x), layer(x))
    assert repr(clone(layer)) == repr(layer)


@pytest.mark.parametrize("rank", BAD_RANKS, ids=repr)
def test_bad_ranks_are_refused_by_name(rank):
    with pytest.raises(lr.LowRankError, match=r"LowRankTransposedLinear.*rank"):
        LowRankTransposedLinear.from_dense(conv1d(), rank=rank)


def test_only_a_conv1d_itself_is_taken():
    class Own(transformers.pytorch_utils.Conv1D):
        pass

    class Conv1D(nn.Module):
        """Another one of that name, as in nn.Conv1d's neighbourhood."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

    for other in (Own(4, 4), Conv1D(), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)):
        with pytest.raises(lr.UnsupportedLayerError, match="expected transformers' Conv1D itself"):
            LowRankTransposedLinear.from_dense(other, rank=2)
    with pytest.raises(lr.UnsupportedLayerError, match=r"expected nn\.Linear itself"):
        lr.LowRankLinear.from_dense(conv1d(), rank=2)


# ----------------------------------------------------------------------------------------------------- whole models


def test_the_plan_of_a_gpt2_uses_it():
    model = gpt2()
    expected = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    assert len(expected) == 8
    plan = lr.make_plan(model, rank=4)
    assert expected <= {entry.name for entry in plan}
    assert "tied" in plan.skipped["lm_head"]
    dense = logits(model, tokens())
    lr.factorize_(model, plan)
    layers = {name for name, module in model.named_modules() if type(module) is LowRankTransposedLinear}
    assert layers == expected
    assert plan.after.params == sum(p.numel() for p in model.parameters())
    out = logits(model, tokens())
    assert bool(out.isfinite().all())
    assert relative(out, dense) > 1e-2
    lr.densify_(model)
    assert {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"} == expected
    assert relative(logits(model, tokens()), out) < TIGHT


def test_at_full_rank_a_gpt2_computes_the_same():
    model = gpt2()
    dense = logits(model, tokens())
    lr.factorize_(model, lr.make_plan(model, rank=1000))
    assert relative(logits(model, tokens()), dense) < 1e-4


def test_it_is_saved_and_loaded(tmp_path):
    model = gpt2()
    plan = lr.make_plan(model, rank=4)
    plan.save(tmp_path / "plan.json")
    assert lr.Plan.load(tmp_path / "plan.json") == plan
    lr.factorize_(model, plan)
    lr.save(model, tmp_path / "model.safetensors")
    torch.manual_seed(99)
    loaded = lr.load(tmp_path / "model.safetensors", into=gpt2())
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert {(e.name, e.rank) for e in lr.Plan.from_model(loaded)} == {
        (e.name, e.rank) for e in plan if e.method != "dense"
    }
    with pytest.raises(lr.CheckpointError):
        lr.load(tmp_path / "model.safetensors", into=gpt2(n_inner=50))


def test_a_calibrated_gpt2_is_nearer_at_the_same_size():
    model = gpt2()
    batches = [{"input_ids": tokens(16, seed)} for seed in range(4)]
    x = tokens(32, 9)
    expected = logits(model, x)
    budget = lr.Budget(params=0.6)
    stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
    linear = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    assert linear <= set(stats)
    for name in linear:
        module = model.get_submodule(name)
        assert stats[name].inputs.second.shape[-2:] == (module.nx, module.nx)
        assert stats[name].gradients.shape[-2:] == (module.nf, module.nf)
    plain = lr.factorize_(copy.deepcopy(model), lr.make_plan(model, budget))
    plan = lr.make_plan(model, budget, stats=stats)
    lr.factorize_(model, plan, stats=stats, data=batches)
    assert plan.after.params <= 0.6 * plan.total.params
    assert relative(logits(model, x), expected) < 0.9 * relative(logits(plain, x), expected)


def test_every_position_counts_its_macs():
    model = gpt2()
    stats = lr.calibrate(model, [tokens(4)])
    plan = lr.make_plan(model, rank=4, stats=stats)
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            assert plan[name].before.macs == 12 * module.nx * module.nf
            assert plan[name].after.macs == 12 * 4 * (module.nx + module.nf)


# ---------------------------------------------------------------------------------------------- without the extra


def test_without_transformers_the_error_names_the_extra(monkeypatch, tmp_path):
    layer = LowRankTransposedLinear.from_dense(conv1d(), rank=2)
    model = nn.Sequential(conv1d())
    plan = lr.make_plan(model, rank=2)
    plan.save(tmp_path / "plan.json")
    for name in ("transformers", "transformers.pytorch_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for needs in (
        layer.to_dense,
        lambda: lr.densify_(nn.Sequential(layer)),
        lambda: lr.Plan.load(tmp_path / "plan.json").set_rank("0", 3),
    ):
        with pytest.raises(lr.MissingExtraError, match=r"lowrank-layers\[transformers\]"):
            needs()
    assert layer(torch.randn(2, INTO)).shape == (2, OUT)  # what needs no Conv1D goes on
    assert lr.make_plan(nn.Sequential(nn.Linear(4, 4)), rank=1)["0"].rank == 1
