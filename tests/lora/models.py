"""Small models that tests of adapters share."""

import torch
from torch import nn


def everything(name, module):
    return True


def every_layout():
    """One layer for each way in which a delta lies in a weight."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(8, 6),
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "embedding": nn.Embedding(9, 5),
            "recurrent": nn.LSTM(5, 4),
        }
    )


def effective_weights(model):
    """Copies of the adapted weights, with their adapters added, by name."""
    return {
        f"{owner}.{key}": getattr(module, key).detach().clone()
        for owner, module in model.named_modules()
        for key in getattr(module, "_adapted_names", ())
    }


class Tied(nn.Module):
    """An embedding, a layer, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices):
        return self.head(torch.tanh(self.mid(self.embed(indices))))
