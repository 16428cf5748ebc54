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
