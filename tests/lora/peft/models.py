"""Models that adapters are exchanged on, and what is done with them."""

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks.vision import import_torchvision

if importlib.util.find_spec("torchvision"):
    import_torchvision()  # transformers imports it where it is installed
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mha(x, x, x)[0])


class Experts(nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 8, 10) if is_transposed else torch.randn(3, 10, 8))
        self.down = nn.Parameter(torch.randn(3, 10, 8) if is_transposed else torch.randn(3, 8, 10))

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.relu(x[None] @ up) @ down).sum(0)


def stack(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


def gpt2():
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def mlp():
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Linear(10, 6))


def tokens():
    return torch.randint(9, (2, 5))


def run(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    return getattr(out, "logits", out)


@torch.no_grad()
def scramble(model):
    """Everything that may learn, at random; running statistics of what is kept whole too."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wanted = "lora_" in key or "modules_to_save" in key or getattr(tensor, "requires_grad", False)
        if wanted and tensor.is_floating_point() and "scaling" not in key and "gate" not in key:
            tensor.add_(torch.rand_like(tensor) * 0.3)
