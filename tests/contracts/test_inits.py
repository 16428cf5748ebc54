"""Every init of adapters keeps the same contract; a new one adds a row to INITS."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr

Init = str | lr.LoRAInit


class Stacked(nn.Module):
    """Three matrices in one parameter, as experts are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,koi->nko", x, self.up)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), (2, 3, 5, 5)),
    "grouped": (lambda: nn.Conv1d(8, 12, 3, groups=2), (2, 8, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 3, 3)),
    "embedding": (lambda: nn.Embedding(9, 6), None),
    "stacked": (Stacked, (5, 8)),
}


@dataclass(frozen=True)
class InitRow:
    """An init.

    Args:
        name: its name.
        make: the init for a model that is run on this input.
        product: whether the product of the factors is other than zero at the start.
        at_base: whether the model computes at the start what the base computes.
        refuses: the layers of ``LAYERS`` that it does not fit.
    """

    name: str
    make: Callable[[nn.Module, Tensor], Init]
    product: bool = False
    at_base: bool = True
    refuses: frozenset[str] = frozenset()


def everything(name: str, module: nn.Module) -> bool:
    return True


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return lr.weight_gradients(model, [(x, None)], lambda out, _: (out - 1).square().mean())


def statistics(model: nn.Module, x: Tensor) -> Any:
    """Of a parameter that no layer of torch's holds there are none."""
    known = nn.Sequential(OrderedDict(other=nn.Linear(8, 6))) if isinstance(model[0], Stacked) else model
    return lr.calibrate(known, [x])


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """What the model would have been, had its weights been quantized."""
    generator = torch.Generator().manual_seed(0)
    return {k: v + torch.randn(v.shape, generator=generator) / 8 for k, v in model.state_dict().items()}


STACKS = frozenset({"grouped", "stacked"})
INITS = [
    InitRow("kaiming", lambda model, x: "kaiming"),
    InitRow("gaussian", lambda model, x: "gaussian"),
    InitRow("orthogonal", lambda model, x: "orthogonal"),
    InitRow("PiSSA", lambda model, x: "pissa", product=True, refuses=STACKS),
    InitRow("OLoRA", lambda model, x: "olora", product=True, refuses=STACKS),
    InitRow("EVA", lambda model, x: lr.EVA(statistics(model, x)), refuses=STACKS | {"embedding"}),
    InitRow("CorDA", lambda model, x: lr.CorDA(statistics(model, x)), product=True, refuses=STACKS | {"embedding"}),
    InitRow("LoRAGA", lambda model, x: lr.LoRAGA(gradients(model, x)), product=True),
    InitRow("LoftQ", lambda model, x: lr.LoftQ(rounded(model)), product=True, at_base=False),
]
ROWS = pytest.mark.parametrize("row", INITS, ids=lambda row: row.name)
FITTING = pytest.mark.parametrize(
    ("row", "layer"),
    [(row, layer) for row in INITS for layer in LAYERS if layer not in row.refuses],
    ids=lambda value: getattr(value, "name", value),
)


def built(layer: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    return nn.Sequential(build()), torch.randint(9, (4, 5)) if shape is None else torch.randn(shape)


def adapter_of(model: nn.Module) -> Any:
    (adapter,) = [a for m in model.modules() if hasattr(m, "adapters") for a in m.adapters.values()]
    return adapter


def started(row: InitRow, layer: str, **settings: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """The base, the same with adapters of rank two, and an input."""
    base, x = built(layer)
    init = row.make(base, x)
    model = lr.add_lora_(
        copy.deepcopy(base), everything, **{"rank": 2, "alpha": 3, "init": init, "seed": 0, **settings}
    )
    return base, model, x


@FITTING
def test_a_model_starts_at_its_base_and_disabled_is_it_to_the_bit(row, layer):
    base, model, x = started(row, layer)
    assert torch.allclose(model(x), base(x), atol=1e-5) == row.at_base
    with lr.lora_disabled(model):
        assert torch.equal(model(x), base(x))
    adapter = adapter_of(model)
    assert (bool(adapter.A.any()) and bool(adapter.B.any())) == row.product
    assert bool(adapter.A.any()) or bool(adapter.B.any())


@FITTING
def test_a_step_moves_the_model_and_both_factors_learn(row, layer):
    _, model, x = started(row, layer)
    optimizer = torch.optim.SGD(lr.lora_parameters(model), lr=0.1)
    before = [p.detach().clone() for p in lr.lora_parameters(model)]
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(lr.lora_parameters(model), before, strict=True))


@FITTING
def test_dora_starts_where_the_adapter_without_it_does(row, layer):
    _, plain, x = started(row, layer)
    _, dora, _ = started(row, layer, dora=True)
    assert torch.allclose(dora(x), plain(x), atol=1e-5)


@FITTING
def test_a_seed_gives_the_same_values(row, layer):
    _, model, _ = started(row, layer)
    torch.manual_seed(17)
    _, same, _ = started(row, layer)
    for one, other in zip(lr.lora_parameters(model), lr.lora_parameters(same), strict=True):
        assert torch.equal(one, other)


@FITTING
def test_a_rule_chooses_a_rank_between_one_and_the_largest(row, layer):
    """The rank that a rule of all energy gives is never above an integer that is lowered to what fits."""
    _, model, _ = started(row, layer, rank=lr.Energy(1.0))
    _, small, _ = started(row, layer, rank=lr.Energy(1e-6))
    with warnings.catch_warnings():  # EVA shares out ranks that fit, and lowers none
        warnings.filterwarnings("ignore", "add_lora_: the rank was lowered", UserWarning)
        _, largest, _ = started(row, layer, rank=1000)
    ranks = [adapter_of(each).B.shape[1 if layer != "stacked" else -1] for each in (small, model, largest)]
    assert 1 == ranks[0] <= ranks[1] <= ranks[2]


@ROWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_adapters_have_the_dtype_that_is_due_on_every_base(row, dtype):
    base, x = built("linear")
    init = row.make(base, x)
    model = lr.add_lora_(base.to(dtype), rank=2, init=init, seed=0)
    wide = torch.promote_types(dtype, torch.float32)
    adapter = adapter_of(model)
    assert {p.dtype for p in lr.lora_parameters(model)} == {wide}
    assert adapter.A.is_contiguous()
    assert adapter.B.is_contiguous()
    assert model(x.to(dtype)).dtype == dtype


@ROWS
def test_saved_adapters_fit_the_untouched_base(row, tmp_path):
    base, model, x = started(row, "linear")
    with torch.no_grad():
        for parameter in lr.lora_parameters(model):
            parameter.add_(torch.randn_like(parameter) / 4)
    lr.save_lora(model, tmp_path)
    assert torch.allclose(lr.load_lora(base, tmp_path)(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("row", "layer"),
    [(row, layer) for row in INITS for layer in sorted(row.refuses)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_layer_that_does_not_fit_is_refused_and_the_model_is_as_it_was(row, layer):
    model, x = built(layer)
    init, keys = row.make(model, x), list(model.state_dict())
    for rank in (2, lr.Energy(0.9)):
        with pytest.raises(lr.LowRankError, match=rf"{row.name} needs .*'0\."):
            lr.add_lora_(model, everything, rank, init=init)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
