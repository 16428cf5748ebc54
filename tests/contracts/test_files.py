"""What lr.save takes, lr.load gives back: every layer, inside a model with buffers, ties and a meta device."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_layers as lr

from .tables import LAYERS

rows = pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Masked(nn.Module):
    """A layer beside buffers that are not finite, as masks, observers and running extremes are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
        self.register_buffer("least", torch.tensor(float("inf")))
        self.register_buffer("unknown", torch.tensor([float("nan"), 1.0]))


@rows
def test_buffers_that_are_not_finite_go_round(row, tmp_path):
    model, other = Masked(row.fresh()), Masked(row.dense())
    for buffer in other.buffers():
        buffer.zero_()
    lr.save(model, tmp_path / "m.safetensors")
    loaded = lr.load(tmp_path / "m.safetensors", into=other)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    x = row.input(row.dense())
    assert torch.equal(loaded.layer(x), model.layer(x))


@rows
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_parameters_that_are_not_finite_are_refused_on_both_sides(row, value, tmp_path):
    path = tmp_path / "m.safetensors"
    good = nn.Sequential(row.fresh())
    lr.save(good, path)
    before = path.read_bytes()
    for name, parameter in list(good.named_parameters()):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = value
        with pytest.raises(lr.CheckpointError, match=f"parameter '{name}' has NaN or Inf"):
            lr.save(good, path)
        assert path.read_bytes() == before
        with torch.no_grad():
            parameter.copy_(kept)
        spoiled = tmp_path / "spoiled.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors[name].view(-1)[0] = value
        save_file(tensors, spoiled, metadata=metadata)
        dense = nn.Sequential(row.dense())
        with pytest.raises(lr.CheckpointError, match=f"parameter '{name}' has NaN or Inf.*unchanged"):
            lr.load(spoiled, into=dense)
        assert type(dense[0]) is row.cls.dense_type


class Tied(nn.Module):
    """A layer between an embedding and the head that is tied to it, with a buffer that no file holds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.embed = nn.Embedding(20, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(False)
        self.register_buffer("scale", torch.arange(1.0, 9.0), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.embed(ids) * self.scale))).sum() + self.layer(x).square().sum()


def train(model: nn.Module, ids: torch.Tensor, x: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, x).backward()
        optimizer.step()


@rows
def test_a_model_on_the_meta_device_becomes_the_saved_one(row, tmp_path):
    path = tmp_path / "m.safetensors"
    model = Tied(row.dense())
    lr.factorize_(model, lr.make_plan(model, rank=1))
    lr.save(model, path)
    with torch.device("meta"):
        empty = Tied(row.dense())
    empty.scale = model.scale.clone()
    loaded = lr.load(path, into=empty)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.head.weight is loaded.embed.weight
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    ids, x = torch.randint(20, (3, 4)), row.input(row.dense())
    for each in (model, loaded):
        train(each, ids, x)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(ids, x), model(ids, x))


@rows
def test_buffers_on_the_meta_device_that_no_file_holds_are_named(row, tmp_path):
    lr.save(Tied(row.fresh()), tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = Tied(row.dense())
    layer = empty.layer
    with pytest.raises(lr.CheckpointError, match=r"'scale'.*Assign them before loading.*unchanged"):
        lr.load(tmp_path / "m.safetensors", into=empty)
    assert empty.layer is layer
    assert all(p.is_meta for p in empty.parameters())
