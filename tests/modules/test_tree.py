import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import module_aliases, named_tensors, walk_layers


class Twice(nn.Module):
    """A factored layer under two names, between layers whose names begin as its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = lr.LowRankLinear(6, 6, rank=2)
        self.fc2 = nn.Linear(6, 6)
        self.block = nn.Sequential(self.fc, nn.ReLU())
        self.register_buffer("scale", torch.ones(1))


def test_layers_are_visited_once_without_their_factors():
    model = Twice()
    assert dict(walk_layers(model)) == {
        "": model,
        "fc": model.fc,
        "fc2": model.fc2,
        "block": model.block,
        "block.1": model.block[1],
    }
    assert list(walk_layers(model.fc)) == [("", model.fc)]


def test_aliases_are_all_names():
    model = Twice()
    aliases = module_aliases(model)
    assert aliases[model.fc] == ["fc", "block.0"]
    assert aliases[model.fc.up] == ["fc.up", "block.0.up"]
    assert aliases[model] == [""]


def test_tensors_have_all_their_names():
    model = Twice()
    tensors = named_tensors(model)
    assert tensors["fc.up.weight"] is tensors["block.0.up.weight"] is model.fc.up.weight
    assert tensors["scale"] is model.scale
    assert len(tensors) == 2 * 3 + 2 + 1
