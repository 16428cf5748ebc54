"""What is written to a computed weight is refused by name: every layer, factored or adapted, every way of writing."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .tables import LAYERS

rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def set_item(layer: nn.Module) -> None:
    layer.weight.detach()[0] = 0


def add_in_place(layer: nn.Module) -> None:
    weight = layer.weight.detach()
    weight += 1


def write_to_a_view(layer: nn.Module) -> None:
    layer.weight.detach().flatten().split(2)[0].mul_(0)


def write_to_the_first_row(layer: nn.Module) -> None:
    layer.weight.data[0].zero_()


def write_out(layer: nn.Module) -> None:
    torch.zeros(layer.weight.shape, out=layer.weight.detach())


def clip_without_gradients(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-1, 1)


def assign_data(layer: nn.Module) -> None:
    layer.weight.data = torch.zeros_like(layer.weight)


def freeze(layer: nn.Module) -> None:
    layer.weight.requires_grad = False


def assign_gradient(layer: nn.Module) -> None:
    layer.weight.grad = torch.zeros_like(layer.weight)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "data.zero_": lambda layer: layer.weight.data.zero_(),
    "data.clamp_": lambda layer: layer.weight.data.clamp_(-0.01, 0.01),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.ones(())),
    "detach().normal_": lambda layer: layer.weight.detach().normal_(),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "register_hook": lambda layer: layer.weight.register_hook(print),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight.detach()], 2),
    "init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "init.constant_": lambda layer: nn.init.constant_(layer.weight, 0.5),
    "init.xavier_uniform_": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "init.kaiming_normal_": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "init.trunc_normal_": lambda layer: nn.init.trunc_normal_(layer.weight),
    "init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    **{
        write.__name__: write
        for write in (
            *(set_item, add_in_place, write_to_a_view, write_to_the_first_row, write_out, clip_without_gradients),
            *(assign_data, freeze, assign_gradient),
        )
    },
}
writes = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@rows
@writes
def test_a_product_of_factors_is_not_written_to(row, write):
    layer = row.fresh()
    before = state_of(layer)
    first = next(name for name, _ in layer.named_parameters())
    with pytest.raises(lr.LowRankError, match=rf"{row.cls.__name__}: its weight is multiplied out.*{first}.*to_dense"):
        write(layer)
    assert same(state_of(layer), before)


@rows
@writes
def test_a_weight_with_adapters_is_not_written_to(row, write):
    layer = row.dense()
    lr.add_lora_(nn.Sequential(layer), ["0"], rank=1)
    before = state_of(layer)
    with pytest.raises(lr.LowRankError, match=r"its weight is read with its adapters added.*remove_lora_.*clone"):
        write(layer)
    assert same(state_of(layer), before)
    with torch.no_grad():  # the remedy of the message
        dict(layer.named_parameters())["weight"].zero_()
    assert not layer.weight.any()


@rows
@pytest.mark.parametrize(
    "value", [lambda w: nn.Parameter(w), lambda w: w, lambda w: None], ids=["parameter", "tensor", "none"]
)
def test_the_weight_of_a_factored_layer_is_not_assigned(row, value):
    layer = row.fresh()
    before = state_of(layer)
    with pytest.raises(lr.LowRankError, match=rf"{row.cls.__name__}: its weight is multiplied out"):
        layer.weight = value(row.dense().weight.detach())
    assert same(state_of(layer), before)


@rows
def test_the_base_of_an_adapted_layer_is_assigned_where_it_fits(row):
    layer = row.dense()
    lr.add_lora_(nn.Sequential(layer), ["0"], rank=1)
    new = nn.Parameter(torch.randn_like(layer.weight))
    layer.weight = new
    assert dict(layer.named_parameters())["weight"] is new
    assert torch.equal(layer.weight, new)  # B is zero
    before = state_of(layer)
    for other in (nn.Parameter(torch.cat([new.detach(), new.detach()])), None):
        with pytest.raises(lr.LowRankError, match="its weight has adapters of shape"):
            layer.weight = other
    assert same(state_of(layer), before)


@pytest.mark.parametrize(
    "row", [row for row in LAYERS if row.fresh(device="meta").bias is not None], ids=lambda row: row.name
)
def test_a_bias_is_assigned_to_the_last_factor(row):
    layer = row.fresh()
    new = nn.Parameter(torch.randn_like(layer.bias))
    layer.bias = new
    assert layer.bias is layer.last.bias is new
    layer.bias = None
    assert layer.bias is None


@rows
def test_reading_gives_an_ordinary_tensor_of_the_same_values(row):
    layer = row.fresh()
    weight, product = layer.weight, layer.product()
    assert type(product) is torch.Tensor
    for read in (
        lambda w: w.clone(),
        lambda w: w * 2,
        lambda w: torch.empty_like(w).copy_(w),
        lambda w: w.double(),
        lambda w: copy.deepcopy(w.detach()),
        lambda w: pickle.loads(pickle.dumps(w.detach())),
        lambda w: nn.Parameter(w.detach().clone()).detach(),
        lambda w: torch.linalg.svd(w.flatten(1))[1],
        lambda w: through_a_file(w.detach()),
        lambda w: torch.from_numpy(w.detach().numpy()),
    ):
        assert type(read(weight)) is torch.Tensor
        assert torch.equal(read(weight), read(product))
    layer.weight.square().sum().backward()
    got = [p.grad for p in layer.parameters() if p.grad is not None]
    expected = torch.autograd.grad(
        layer.product().square().sum(), [p for p in layer.parameters() if p.grad is not None]
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.autograd.grad(weight.sum(), weight)[0].eq(1).all()


def through_a_file(weight: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["weight"]


class Reads(nn.Module):
    """A model that reads a computed weight beside calling its layer: a penalty, a tied head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sum() + self.layer.weight.detach().square().sum() + self.layer.weight.abs().mean()


@rows
def test_compilers_exporters_and_transformations_read_it(row):
    torch._dynamo.reset()
    model = Reads(row.fresh()).eval()
    x = row.input(row.dense(), 3)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), expected)

    def penalty(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(Weight(model.layer), parameters, ())

    parameters = {f"layer.{name}": p.detach() for name, p in model.layer.named_parameters()}
    gradients = torch.func.grad(penalty)(parameters)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    both = torch.func.vmap(torch.func.grad(penalty))(stacked)
    for name, gradient in gradients.items():
        torch.testing.assert_close(both[name][0], gradient)


class Weight(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return self.layer.weight.square().sum()
