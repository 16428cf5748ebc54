import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.modules import open_attentions, openable_attentions, opened_attentions


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.MultiheadAttention(8, 2)
        self.again = self.plain
        self.hooked = nn.MultiheadAttention(8, 2)
        self.hooked.out_proj.register_forward_hook(lambda *_: None)
        self.tied = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.tied.out_proj.weight


def test_inside_attentions_are_views_of_their_own_weights_and_outside_they_are_as_before():
    model = Model()
    closed, weight = model.plain, model.plain.in_proj_weight
    assert openable_attentions(model) == {"plain": closed}
    with opened_attentions(model):
        assert set(open_attentions(model)) == {"plain"}
        assert model.plain is model.again
        with torch.no_grad():
            model.plain.k_proj.weight.fill_(2.0)
        assert type(model.hooked) is type(model.tied) is nn.MultiheadAttention
    assert model.plain is model.again is closed
    assert closed.in_proj_weight is weight
    assert bool((weight[8:16] == 2).all())
    assert not bool((weight[:8] == 2).any())


def refuse() -> None:
    raise lr.LowRankError("refused")


def test_only_the_named_ones_are_opened_and_an_error_closes_them():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    before = list(model)
    with opened_attentions(model, only={"1"}):
        assert set(open_attentions(model)) == {"1"}
    with pytest.raises(lr.LowRankError, match="refused"), opened_attentions(model):
        refuse()
    assert all(module is old for module, old in zip(model, before, strict=True))


def test_torchs_fast_paths_are_off_inside_and_after_factorizing_and_on_again_after():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval()

    def paths() -> tuple[int, bool]:
        return model.layers[0].activation_relu_or_gelu, model.use_nested_tensor

    dense = paths()
    with opened_attentions(model):
        assert paths() == (0, False)
    assert paths() == dense
    lr.factorize_(model, lr.make_plan(model, rank=2))
    assert paths() == (0, False)
    lr.densify_(model)
    assert paths() == dense != (0, False)
