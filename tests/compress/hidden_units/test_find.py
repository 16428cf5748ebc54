"""Hidden units are found by trying: outputs that one other layer reads, each by columns of its own."""

import torch
import torch.nn.functional as F
from torch import nn

from lowrank_layers.compress.hidden_units.find import HiddenUnits, find_hidden_units

IMAGES = torch.randn(2, 3, 8, 8)


def found(model: nn.Module, batch: torch.Tensor) -> list[HiddenUnits]:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    units = find_hidden_units(model.eval(), batch, with_target=False)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(getattr(layer, "in_features", 8) > 3 for layer in model.modules())  # sizes are back as well
    return units


def test_those_of_a_perceptron_and_of_a_convolution_before_it():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 7), nn.Tanh(),
        nn.Linear(7, 4),
    )  # fmt: skip
    assert found(model, IMAGES) == [HiddenUnits(("0",), ("1",), "5", 5), HiddenUnits(("5",), (), "7", 7)]


def test_the_inner_channels_of_a_residual_block_and_not_those_of_its_stream():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(6, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, 1, 1)

        def forward(self, x):
            return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))

    model = nn.Sequential(nn.Conv2d(3, 6, 3), Block(), Block(), nn.Conv2d(6, 4, 3))
    names = [(units.producers, units.norms, units.consumer) for units in found(model, IMAGES)]
    assert names == [((f"{k}.first",), (f"{k}.norm",), f"{k}.second") for k in (1, 2)]


def test_gated_units_have_two_producers_whatever_the_model_returns():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x):
            return {"states": x + self.down(F.silu(self.gate(x)) * self.up(x))}

    assert found(Gated(), torch.randn(5, 6)) == [HiddenUnits(("gate", "up"), (), "down", 9)]


def test_heads_of_attention_have_none_even_where_half_of_them_would_run():
    """Its scores are so small that all positions count alike: half of the queries and keys give the same output."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
            with torch.no_grad():
                self.query.weight.mul_(1e-3)
                self.query.bias.mul_(1e-3)

        def forward(self, x):
            heads = [layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
            return x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    assert found(Attention(), torch.randn(2, 5, 8)) == []


def test_what_mixes_units_or_reads_them_twice_has_none():
    class Twice(nn.Module):
        def __init__(self, between: nn.Module, share: float) -> None:
            super().__init__()
            self.first, self.between, self.second, self.share = nn.Linear(6, 8), between, nn.Linear(8, 4), share

        def forward(self, x):
            h = self.between(self.first(x).relu())
            return self.second(h) + self.share * h.sum(-1, keepdim=True)

    x = torch.randn(5, 6)
    assert len(found(Twice(nn.Identity(), 0.0), x)) == 1
    for between, share in ((nn.Identity(), 1.0), (nn.Softmax(-1), 0.0), (nn.LayerNorm(8), 0.0)):
        assert found(Twice(between, share), x) == []
    tied = Twice(nn.Identity(), 0.0)
    tied.other = nn.Linear(6, 8)
    tied.other.weight = tied.first.weight
    assert found(tied, x) == []


class GatedBlock(nn.Module):
    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        self.norm, self.leak = nn.LayerNorm(6), leak
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        h = F.silu(self.gate(self.norm(x))) * self.up(self.norm(x))
        return x + self.down(h) + self.leak * h.sum(-1, keepdim=True)


def test_whatever_a_block_returns_beside_its_stream():
    class Returns(GatedBlock):
        def forward(self, x):
            scores = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            return super().forward(x), scores, torch.arange(5), torch.empty(0, 3), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Returns() for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x, *_ = block(x)
            return x

    assert len(found(Model(), torch.randn(5, 6))) == 2


def test_time_is_linear_in_depth():
    """A layer is changed, and the model is run from its block on to the end of it."""

    def calls(depth: int) -> int:
        model, count = nn.Sequential(*(GatedBlock() for _ in range(depth))), 0

        def note(module: nn.Module, args: object) -> None:
            nonlocal count
            count += isinstance(module, nn.Linear)

        handle = nn.modules.module.register_module_forward_pre_hook(note)
        try:
            assert len(found(model, torch.randn(5, 6))) == depth
        finally:
            handle.remove()
        return count

    few, more, most = calls(4), calls(8), calls(12)
    assert most - more == more - few


def test_a_stream_with_one_large_entry_hides_nothing():
    """Were the outputs compared by one scale, what is read twice would pass for rounding."""
    x = torch.randn(5, 6)
    x[:, 2] = 1e4
    for leak, count in ((0.0, 2), (0.01, 0)):
        model = nn.Sequential(GatedBlock(leak), GatedBlock(leak), nn.Linear(6, 3))
        assert len(found(model, x)) == count
