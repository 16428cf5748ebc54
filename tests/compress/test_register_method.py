"""A user's own method with its own layer: registered, planned, built, saved and loaded like those of the library."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.compress.method import factored_costs
from lowrank_layers.layers import FACTORED_LAYERS
from lowrank_layers.layers.conversion import adopt, fill


def define_layer() -> type[lr.FactoredModule]:
    class ColumnLinear(lr.FactoredModule):
        """A linear layer that reads only ``rank`` of its inputs."""

        dense_type = nn.Linear

        def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
            rank = min(kwargs.pop("rank"), in_features)
            super().__init__()
            self.in_features = in_features
            self.read = nn.Linear(rank, out_features, bias, **kwargs)
            self.register_buffer("columns", torch.arange(rank, device=kwargs.get("device")))

        @property
        def rank(self) -> int:
            return self.read.in_features

        def product(self) -> Tensor:
            weight = self.read.weight
            return weight.new_zeros(len(weight), self.in_features).index_copy(1, self.columns, weight)

        def forward(self, input: Tensor) -> Tensor:
            return self.read(input[..., self.columns])

        @classmethod
        def like(cls, dense: nn.Linear, *, rank: int, bias: bool | None = None) -> lr.FactoredModule:
            bias = dense.bias is not None if bias is None else bias
            layer = cls(dense.in_features, dense.out_features, bias, rank=rank, device="meta", dtype=dense.weight.dtype)
            return adopt(layer.to_empty(device=dense.weight.device), dense)

        def to_dense(self) -> nn.Linear:
            shape = (self.in_features, self.read.out_features)
            dense = nn.Linear(*shape, self.read.bias is not None, device=self.read.weight.device)
            return fill_dense(dense, self.weight, self.bias)

    return ColumnLinear


def fill_dense(dense: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    if not weight.is_meta:
        dense.weight.data.copy_(weight)
        if bias is not None:
            dense.bias.data.copy_(bias)
    return dense


def define_method(layer: type[lr.FactoredModule]) -> type[lr.Method]:
    @dataclass(frozen=True)
    class ColumnMethod:
        """Keeps the first or the last inputs, without a look at the statistics."""

        name: ClassVar[str] = "columns"
        layers: ClassVar[tuple[type[lr.FactoredModule], ...]] = (layer,)
        form: ClassVar[dict[str, Any]] = {}

        keep: str = "first"
        ranks: tuple[int, ...] = (2, 4, 6)

        def matches(self, layer: lr.Candidate) -> bool:
            return type(layer.module) is nn.Linear

        def options(self, layer: lr.Candidate) -> list[lr.Option]:
            weight = layer.module.weight.detach().double()
            losses = []
            for rank in self.ranks:
                left = weight.clone()
                left[:, self._columns(weight, rank)] = 0
                losses.append(0.5 * float(left.square().sum()))
            return list(map(lr.Option, self.ranks, factored_costs(self, layer, self.ranks), losses))

        def choose(self, layer: lr.Candidate, rank: Any) -> int:
            return min(rank, layer.module.in_features)

        def build(self, layer: lr.Candidate, rank: int) -> lr.FactoredModule:
            (cls,) = self.layers
            columns = self._columns(layer.module.weight, rank)
            new = cls.like(layer.module, rank=rank, bias=layer.has_bias)
            new.columns.copy_(columns)
            return fill(new, [layer.module.weight[:, columns]], layer.module.bias)

        def _columns(self, weight: Tensor, rank: int) -> Tensor:
            every = torch.arange(weight.shape[1])
            return every[:rank] if self.keep == "first" else every[-rank:]

    return ColumnMethod


@pytest.fixture
def columns():
    """The class of the method, registered, and forgotten again after the test."""
    method = define_method(define_layer())
    lr.register_method(method())
    yield method
    lr.METHODS.pop("columns", None)
    FACTORED_LAYERS.pop("ColumnLinear", None)


@pytest.fixture
def model() -> nn.Module:
    """The first layer reads its first four inputs only, the second one its last four."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:, 4:] = 0
        model[2].weight[:, :4] = 0
    return model


def test_two_instances_compete_and_each_layer_is_built_with_the_settings_that_won(columns, model, tmp_path):
    both = [columns(keep="first"), columns(keep="last")]
    plan = lr.make_plan(model, lr.Budget(params=0.6), methods=both)
    assert [(entry.method, entry.rank) for entry in plan] == [("columns", 4)] * 2
    assert [entry.settings["keep"] for entry in plan] == ["first", "last"]
    assert [entry.label for entry in plan] == ["columns", "columns(keep='last')"]
    assert "columns(keep='last')" in str(plan)
    plan.save(tmp_path / "plan.json")
    loaded = lr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded["2"].settings == {"keep": "last", "ranks": (2, 4, 6)}

    x = torch.randn(5, 8)
    small = lr.factorize_(copy.deepcopy(model), loaded)
    assert [layer.columns.tolist() for layer in (small[0], small[2])] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.allclose(small(x), model(x), atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) == plan.after.params

    lr.save(small, tmp_path / "small.safetensors")
    again = lr.load(tmp_path / "small.safetensors", into=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert torch.equal(again(x), small(x))
    assert {entry.method for entry in lr.Plan.from_model(again)} == {"columns"}
    assert type(lr.densify_(again)[0]) is nn.Linear


def test_it_competes_with_the_methods_of_the_library(columns, model):
    """It stores four columns of eight exactly, which a pair of factors could not do at that size."""
    plan = lr.make_plan(model, lr.Budget(params=0.6))
    assert plan["0"].method == "columns"


def test_an_edited_rank_keeps_the_settings(columns, model):
    plan = lr.make_plan(model, rank=4, methods=[columns(keep="last")])
    assert plan.set_rank("0", 2)["0"].settings["keep"] == "last"
    assert plan.set_rank("0", 2, method="svd").set_rank("0", 2, method="columns")["0"].settings["keep"] == "first"
    assert plan.drop("2")["2"].settings == {}


def test_it_takes_part_in_the_sequential_regression(columns, model):
    x = torch.randn(64, 8)
    stats = lr.calibrate(model, [x], loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, rank=8, methods=[columns(keep="last")], stats=stats)
    small = lr.factorize_(copy.deepcopy(model), plan, stats=stats, data=[x])
    assert torch.allclose(small(x), model(x), atol=1e-5)


def test_loading_says_that_the_method_is_registered_first(columns, model):
    text = lr.make_plan(model, rank=4, methods=[columns()]).to_json()
    del lr.METHODS["columns"]
    with pytest.raises(lr.LowRankError, match=r"plan: the method 'columns' is not registered; call lr\.register"):
        lr.Plan.from_json(text)
    with pytest.raises(lr.LowRankError, match=r"a method of your own is registered first, with lr\.register_method"):
        lr.make_plan(model, rank=4, methods=[columns()])


def test_loading_a_model_says_that_the_layer_is_imported_first(columns, model, tmp_path):
    lr.save(lr.factorize_(model, lr.make_plan(model, rank=4, methods=[columns()])), tmp_path / "small.safetensors")
    del FACTORED_LAYERS["ColumnLinear"]
    with pytest.raises(lr.CheckpointError, match="its class 'ColumnLinear' is unknown; import the module that defines"):
        lr.load(tmp_path / "small.safetensors", into=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))


def test_a_plan_of_other_settings_than_the_class_has_is_refused(columns, model):
    text = lr.make_plan(model, rank=4, methods=[columns()]).to_json()
    with pytest.raises(lr.LowRankError, match="the method 'columns' does not take the settings"):
        lr.Plan.from_json(text.replace('"keep"', '"leave"'))


def test_a_registered_instance_of_the_same_class_is_replaced(columns, model):
    assert lr.register_method(columns(keep="last")) is lr.METHODS["columns"]
    assert lr.make_plan(model, rank=4, methods=[lr.METHODS["columns"]])["0"].settings["keep"] == "last"


class NoDataclass:
    name = "columns"


@dataclass(frozen=True)
class Incomplete:
    name: ClassVar[str] = "incomplete"
    layers: ClassVar[tuple[type, ...]] = ()


def changed(columns, **members):
    """An instance of a subclass of the method with other members."""
    return dataclass(frozen=True)(type("Changed", (columns,), members))()


REFUSED = [
    (lambda columns: NoDataclass(), "expected an instance of a frozen dataclass"),
    (lambda columns: columns, "expected an instance of a frozen dataclass"),
    (lambda columns: Incomplete(), "Incomplete has no form, matches, options, choose, build"),
    (lambda columns: changed(columns, name="dense"), "got the name 'dense'"),
    (lambda columns: changed(columns, name=""), "got the name ''"),
    (lambda columns: changed(columns, name="svd"), "the name 'svd' is taken by SVDMethod"),
    (lambda columns: changed(columns, name="new", layers=(nn.Linear,)), "expected subclasses of FactoredModule"),
    (lambda columns: changed(columns, name="new", layers=()), "expected subclasses of FactoredModule"),
    (lambda columns: columns(ranks=torch.ones(2)), r"got ranks=tensor\(\[1., 1.\]\), expected a number"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_method_is_refused(columns, make, message):
    before = dict(lr.METHODS)
    with pytest.raises(lr.LowRankError, match=message):
        lr.register_method(make(columns))
    assert before == lr.METHODS
