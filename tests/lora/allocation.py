"""What the tests of LoraRankAllocator share: models of every layout, random gradients, a run up to its budget."""

import itertools

import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers.lora.adapted_weight import adapted_weights

from . import test_adapters


class Stacked(nn.Module):
    """Three matrices in one parameter, as experts are kept."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8) / 8)

    def forward(self, x):
        return torch.einsum("ni,koi->nko", x, self.up)


MODELS = test_adapters.MODELS | {"stacked": (lambda: nn.Sequential(nn.Linear(8, 8), Stacked()), (4, 8))}


def make(name):
    build, shape = MODELS[name]
    return build().eval(), torch.randint(9, (2, 5)) if shape is None else torch.randn(shape)


def adapters(model, name="default"):
    """The adapters of one name with their layouts, by the weight's name."""
    return {weight.name: (weight.adapter(name), weight.layout) for weight in adapted_weights(model, name)}


@torch.no_grad()
def pretend(model, generator, strength=lambda label: 1.0, rate=0.01):
    """Random gradients, and one step along them."""
    for label, (adapter, _) in adapters(model).items():
        for p in (adapter.A, adapter.B):
            if p.requires_grad:
                p.grad = (torch.randn(p.shape, generator=generator) * strength(label)).to(p)
                p -= rate * p.grad


def allocated(model, rank, stop=6, strength=lambda label: 1.0, **settings):
    """An allocator that has reached its budget."""
    allocator = lr.LoraRankAllocator(model, rank, start=1, stop=stop, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(stop):
        pretend(model, generator, strength)
        allocator.step()
    return allocator


def favouring(*labels):
    return lambda label: 10.0 if label in labels else 0.1


def chain(*widths):
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])


def kept(allocator, label):
    """Which directions of a weight count, as flags."""
    return allocator.state_dict()[f"{label}.kept"]
