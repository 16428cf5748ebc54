"""Small models and their files."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_layers.command_line import main


class Small(nn.Module):
    """An embedding, a norm, three linear layers and a head."""

    def __init__(self, vocabulary: int = 30) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, 16)
        self.layers = nn.Sequential(
            OrderedDict(up=nn.Linear(16, 40), down=nn.Linear(40, 16), norm=nn.LayerNorm(16), out=nn.Linear(16, 16))
        )
        self.lm_head = nn.Linear(16, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.layers(self.embed_tokens(tokens)))


def write(model: nn.Module, path: Path) -> Path:
    save_file(model.state_dict(), path)
    return path


def write_sharded(tensors: dict[str, Tensor], folder: Path, shards: int = 2) -> Path:
    """The layout of transformers: an index and several files."""
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[k::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[k::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    """What a command prints with ``--json``."""
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def low_rank(model: nn.Module, rank: int = 3) -> nn.Module:
    """The model with small changes of that rank in its linear layers."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                module.weight += 0.02 * torch.randn(rows, rank) @ torch.randn(rank, columns)
    return model
