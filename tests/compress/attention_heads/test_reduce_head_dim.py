"""Smaller heads: exactness where heads are redundant, ordinary folders, and what is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.compress.attention_heads.rotary_pairs import from_pairs, to_pairs

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TOKENS = torch.arange(4 * 24).view(4, 24) * 7 % 60


def model_of(kind: str, **more: object) -> nn.Module:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "head_dim": 16, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval().requires_grad_(False)
    with torch.no_grad():  # sharper attention than at initialization, and biases that are not zero
        for name, parameter in model.named_parameters():
            if "_proj" in name and "self_attn" in name:
                parameter.normal_(std=0.25)
    return model


def is_projection(name: str, *keys: str) -> bool:
    return any(f"{key}_proj" in name for key in keys)


def without_pairs(model: nn.Module, gone: list[int]) -> nn.Module:
    """Queries and keys without some pairs, and values with half of their directions."""
    mix = torch.randn(16, 10).double() @ torch.randn(10, 16).double() / 10
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_projection(name, "q", "k"):
                for head in parameter.view(-1, 16, *parameter.shape[1:]):
                    head[[*gone, *(pair + 8 for pair in gone)]] = 0
            elif is_projection(name, "v"):
                heads = parameter.view(-1, 16, *parameter.shape[1:])
                parameter.copy_(torch.einsum("de,he...->hd...", mix, heads).reshape_as(parameter))
    return model


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_heads_without_some_pairs_and_directions_become_smaller_without_a_trace(kind):
    model = without_pairs(model_of(kind), [1, 4, 6])
    assert (model.model.layers[0].self_attn.k_proj.bias is not None) == (kind == "Qwen2")
    before, frequencies = model(TOKENS).logits, model.model.rotary_emb.inv_freq
    assert lr.reduce_head_dim_(model, [TOKENS], 10, damping=lr.Damping(inputs=0.0)) is model
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.out_features == attention.o_proj.in_features == 40
    assert attention.k_proj.out_features == attention.v_proj.out_features == 20
    kept = torch.tensor([0, 2, 3, 5, 7])
    assert torch.allclose(model.model.rotary_emb.inv_freq.double(), frequencies[kept])
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-5)


def test_pairs_of_one_frequency_are_one_matrix_whose_rank_counts():
    """Two pairs that turn alike, whose product has complex rank one, are one pair."""
    model = without_pairs(model_of("Llama"), [])
    model.model.rotary_emb.inv_freq[6] = model.model.rotary_emb.inv_freq[7]
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                for head in projection.weight.view(-1, 16, 32):
                    pairs = to_pairs(head)
                    pairs[6] = (0.3 + 0.8j) * pairs[7]
                    head.copy_(from_pairs(pairs))
    before = model(TOKENS).logits
    lr.reduce_head_dim_(model, [TOKENS], 14, damping=lr.Damping(inputs=0.0))
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-5)


def test_values_say_as_much_as_the_best_map_of_as_few_entries_can():
    """Queries and keys stay; the outputs of the first attention are those of a regression on the entries that stay."""
    model = without_pairs(model_of("Llama"), [3, 5])
    dense = copy.deepcopy(model)
    lr.reduce_head_dim_(model, [TOKENS], 12, damping=lr.Damping(inputs=0.0))
    seen = {}
    for key, each in (("dense", dense), ("small", model)):
        projection = each.model.layers[0].self_attn.o_proj
        projection.register_forward_hook(lambda m, args, out, key=key: seen.update({key: (args[0], out)}))
        each(TOKENS)
    read, gave = seen["small"][0].flatten(0, 1), seen["dense"][1].flatten(0, 1)
    best = torch.linalg.lstsq(read, gave).solution
    assert torch.allclose(seen["small"][1].flatten(0, 1), read @ best, atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_the_folder_is_read_without_this_library(kind, tmp_path):
    model = model_of(kind)
    lr.reduce_head_dim_(model, [{"input_ids": TOKENS}], 10)
    model.float().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 10
    torch.save((TOKENS, model(TOKENS).logits), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules.update(lowrank_layers=None, torchvision=None)\n"
        "import transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "tokens, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(tokens).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_decoding_with_a_cache_gives_what_reading_at_once_gives():
    model = lr.reduce_head_dim_(model_of("Llama"), [TOKENS], 8)
    start = model(TOKENS[:, :20], use_cache=True)
    rest = model(TOKENS[:, 20:], past_key_values=start.past_key_values).logits
    assert torch.allclose(rest, model(TOKENS).logits[:, 20:], atol=1e-4)
    assert start.past_key_values.layers[0].keys.shape == start.past_key_values.layers[0].values.shape == (4, 2, 24, 8)


def test_it_goes_on_with_a_model_that_was_made_smaller_and_with_hidden_units():
    model = lr.reduce_head_dim_(model_of("Llama"), [TOKENS], 12)
    lr.reduce_head_dim_(model, [TOKENS], 10)
    lr.remove_units_(model, [{"input_ids": TOKENS}], lr.Budget(params=0.9), uniform=True)
    assert model.config.head_dim == 10
    assert model.config.intermediate_size < 48
    other = type(model)(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("Llama", 16, "expected an even number below 16"),
        ("Llama", 7, "expected an even number below 16"),
        ("Llama", 8.0, "expected an even number below 16"),
        ("Qwen3", 8, "not as in a Llama"),  # norms of queries and keys
        ("Cohere", 8, "in another way than a Llama"),  # neighbours turn with each other
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(kind, size, words):
    model = model_of(kind) if kind != "Cohere" else model_of(kind, num_attention_heads=2, num_key_value_heads=1)
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    logits = model(TOKENS).logits
    with pytest.raises(lr.LowRankError, match=words):
        lr.reduce_head_dim_(model, [TOKENS], size)
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, logits)


def test_other_models_are_refused():
    with pytest.raises(lr.LowRankError, match="no rope_parameters"):
        lr.reduce_head_dim_(nn.Linear(4, 4), [torch.randn(2, 4)], 2)
    with pytest.raises(lr.LowRankError, match="depend on the length"):
        lr.reduce_head_dim_(model_of("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), [TOKENS], 8)
    with pytest.raises(lr.LowRankError, match="no batches"):
        lr.reduce_head_dim_(model_of("Llama"), [], 8)
