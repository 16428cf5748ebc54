"""Passes from one stage of a model on return what whole passes do."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.vision import import_torchvision
from lowrank_layers.calibrate import forward, main_output
from lowrank_layers.calibrate.overridden import overridden
from lowrank_layers.calibrate.prefix_memo import PrefixMemo
from lowrank_layers.modules import opened_attentions, walk_layers

from .staged_models import MODELS, case


def halved(layer: nn.Module):
    """What the layer computes by itself, halved."""
    own = partial(type(layer).forward, layer)
    return lambda *args, **kwargs: own(*args, **kwargs) / 2


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_from_any_layer_on_is_that_of_the_changed_model(name):
    if name in ("llama", "t5"):
        pytest.importorskip("transformers")
        import_torchvision()
    model, batches, _, _ = case(name, with_loss=False)
    twin = copy.deepcopy(model)
    with opened_attentions(model), opened_attentions(twin), PrefixMemo(model, with_target=False, mask=None) as memo:
        known = [memo.add(batch) for batch in batches]
        for layer, module in walk_layers(model):
            if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                continue
            other = twin.get_submodule(layer)
            with torch.no_grad(), overridden(module, halved(module)), overridden(other, halved(other)):
                for each, batch in zip(known, batches, strict=True):
                    whole = main_output(forward(twin, batch, with_target=False)[0])
                    assert torch.equal(main_output(memo.rerun(each, layer)), whole)
    assert not any("forward" in vars(module) for module in model.modules())


def count_calls(model: nn.Sequential) -> list[int]:
    """The places of the items that are run, from now on."""
    calls: list[int] = []
    for place, module in enumerate(model):
        own = module.forward
        module.forward = lambda x, own=own, place=place: calls.append(place) or own(x)
    return calls


def test_stages_before_the_layer_are_not_run():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    calls = count_calls(model)
    with PrefixMemo(model, with_target=False, mask=None) as memo:
        known = memo.add(torch.randn(3, 6))
        for place in range(5):
            calls.clear()
            memo.rerun(known, str(place))
            assert calls == list(range(place, 5))


class Accumulates(nn.Module):
    """Adds to its input in place, where the model still has it, and returns something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        y = self.layer(x)
        x += y
        return y


class Hidden(nn.Module):
    """What its stages do to the stream is no output of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Accumulates() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        stream = x.clone()
        for block in self.blocks:
            block(stream)
        return self.head(stream)


def test_stages_that_work_in_place_are_run_from_the_start():
    model, x = Hidden(), torch.randn(5, 6)
    with PrefixMemo(model, with_target=False, mask=None) as memo:
        known = memo.add(x)
        with torch.no_grad():
            model.head.weight.mul_(2)
            assert torch.allclose(memo.rerun(known, "head"), model(x))
            assert not torch.allclose(memo.rerun(known, "head"), known.output)
