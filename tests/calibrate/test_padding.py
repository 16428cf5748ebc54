"""Statistics of padded batches are those of the same samples without padding, in whole models."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

if importlib.util.find_spec("torchvision"):
    import_torchvision()
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHORT = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SHORT |= {"vocab_size": 60, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
BATCH, LENGTH, PADDING = 3, 5, 4

MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("Bert", "ForTokenClassification", SIZES, "right"),
    "pooled bert": ("Bert", "ForSequenceClassification", SIZES | {"num_labels": 5}, "right"),
    "albert": ("Albert", "ForMaskedLM", SIZES | {"embedding_size": 8}, "right"),
    "mpnet": ("MPNet", "ForMaskedLM", SIZES, "right"),  # biases of relative positions
    "xlnet": (
        "XLNet",
        "LMHeadModel",
        {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2},
        "right",
    ),  # time first
    "llama right": ("Llama", "ForCausalLM", SIZES, "right"),
    "llama left": ("Llama", "ForCausalLM", SIZES, "left"),
    "gpt2": ("GPT2", "LMHeadModel", {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2}, "right"),
    "opt left": ("OPT", "ForCausalLM", SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16}, "left"),
    "mamba right": ("Mamba", "ForCausalLM", SIZES | {"state_size": 4}, "right"),  # convolutions
    "mamba left": ("Mamba", "ForCausalLM", SIZES | {"state_size": 4}, "left"),
}
PAIRS = {
    "t5": ("T5", SIZES | {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "decoder_start_token_id": 0}),
    "bart": ("Bart", SHORT),
}


def built(kind: str, head: str, settings: dict[str, Any]) -> nn.Module:
    model = getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**settings)).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def padded(x: Tensor, side: str = "right", value: int = 0, by: int = PADDING) -> Tensor:
    return F.pad(x, (by, 0) if side == "left" else (0, by), value=value)


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, 60, (BATCH, length))


def check_same(stats: lr.Statistics, expected: lr.Statistics, tolerance: float = 1e-6) -> None:
    assert list(stats) == list(expected)
    assert (stats.samples, stats.other_macs) == (expected.samples, expected.other_macs)
    for name, want in expected.items():
        got = stats[name]
        assert got.inputs.rows == want.inputs.rows, name
        assert got.input_shape == want.input_shape, name
        assert (got.positions, got.repeats) == pytest.approx((want.positions, want.repeats), rel=1e-12), name
        pairs = [(got.inputs.second, want.inputs.second), (got.inputs.mean, want.inputs.mean)]
        assert (got.gradients is None) == (want.gradients is None), name
        if got.gradients is not None and want.gradients is not None:
            pairs.append((got.gradients, want.gradients))
        for a, b in pairs:
            assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b), name


@pytest.mark.parametrize("kind", MODELS)
def test_an_attention_mask_is_followed(kind):
    family, head, settings, side = MODELS[kind]
    model, ids = built(family, head, settings), tokens()
    ones = torch.ones_like(ids)
    expected = lr.calibrate(model, [{"input_ids": ids, "attention_mask": ones}], loss=lr.SampledCrossEntropy())
    batch = {"input_ids": padded(ids, side, 7), "attention_mask": padded(ones, side)}
    check_same(lr.calibrate(model, [batch], loss=lr.SampledCrossEntropy()), expected)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(("length", "by"), [(3, 2), (3, 4), (3, 6), (LENGTH, PADDING), (9, 0), (9, 2)])
@pytest.mark.parametrize("given", ["mask", "labels", "loss of the model", "labels alone"])
def test_encoder_and_decoder_each_have_their_own(kind, length, by, given):
    """Also where both are padded to one length, so that no shape tells them apart."""
    family, settings = PAIRS[kind]
    model, ids, target = built(family, "ForConditionalGeneration", settings), tokens(), tokens(length)
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = {"input_ids": padded(ids, value=7), "attention_mask": padded(torch.ones_like(ids))}
    if given == "mask":
        ones = torch.ones_like(target)
        plain |= {"decoder_input_ids": target, "decoder_attention_mask": ones}
        batch |= {"decoder_input_ids": padded(target, value=7, by=by), "decoder_attention_mask": padded(ones, by=by)}
    else:
        plain |= {"labels": target}
        batch |= {"labels": padded(target, value=-100, by=by)}
    if given == "labels alone":  # an encoder without padding, where the labels are padded to its length too
        plain, batch = {**plain, "attention_mask": None}, {**plain, **batch, "input_ids": ids, "attention_mask": None}

    def loss() -> Any:
        return (lambda output, labels: output.loss) if given == "loss of the model" else lr.SampledCrossEntropy()

    check_same(lr.calibrate(model, [batch], loss=loss()), lr.calibrate(model, [plain], loss=loss()))


def ragged(ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A mask of other lengths for every sample, and the samples alone."""
    mask = torch.arange(ids.shape[1]) < torch.tensor([[2], [5], [4]])
    return mask, [row[keep][None] for row, keep in zip(ids, mask, strict=True)]


def summed(output: Any, target: Any, mask: Tensor | None = None) -> Tensor:
    """Each sample's sum over its positions, averaged over the batch."""
    each = (output.logits if hasattr(output, "logits") else output).square().mean(-1)
    return (each if mask is None else each * mask).sum(1).mean()


@pytest.mark.parametrize("kind", ["bert", "llama right", "gpt2"])
def test_samples_of_several_lengths(kind):
    family, head, settings, _ = MODELS[kind]
    model, ids = built(family, head, settings), tokens()
    mask, alone = ragged(ids)
    expected = lr.calibrate(model, [{"input_ids": row} for row in alone], loss=summed)
    stats = lr.calibrate(model, [{"input_ids": ids, "attention_mask": mask.long()}], loss=summed)
    for name, want in expected.items():
        if "position" in name or "wpe" in name or "token_type" in name:
            continue  # one row for the whole batch
        got = stats[name]
        assert got.inputs.rows == want.inputs.rows
        for a, b in ((got.inputs.second, want.inputs.second), (got.gradients, want.gradients)):
            assert torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(b), name
        # the same multiply-accumulates per sample, though the shape of the longest is written down
        costs = [each.repeats * each.input_shape[0] for each in (got, want)]
        assert costs[0] == pytest.approx(costs[1])


class Transformer(nn.Module):
    """torch's own, padded as torch's layers are told."""

    def __init__(self, batch_first: bool, size: int = 16) -> None:
        super().__init__()
        self.inner = nn.Transformer(size, 2, 2, 2, 24, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(size, 6)

    def forward(self, src: Tensor, tgt: Tensor, **masks: Tensor) -> Tensor:
        return self.head(self.inner(src, tgt, **masks))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # where time comes first
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [(5, 4), (6, 4), (7, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_key_padding_masks_of_torch_are_followed(batch_first, sizes, dtype):
    """Batch or time first, also where a batch of nine samples has nine positions."""
    model = Transformer(batch_first).double().eval()
    batch = {"src": torch.randn(9, 5, 16).double(), "tgt": torch.randn(9, sizes[0], 16).double()}
    plain = {key: x if batch_first else x.transpose(0, 1) for key, x in batch.items()}
    full = {key: F.pad(x, (0, 0, 0, by), value=3.0) for (key, x), by in zip(batch.items(), (4, sizes[1]), strict=True)}
    hidden = {key: torch.zeros(x.shape[:2], dtype=torch.bool) for key, x in full.items()}
    for key, x in batch.items():
        hidden[key][:, x.shape[1] :] = True
    masks = {f"{key}_key_padding_mask": mask for key, mask in hidden.items()}
    masks["memory_key_padding_mask"] = hidden["src"]
    if dtype != torch.bool:
        masks = {key: torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) for key, mask in masks.items()}
    full = {key: x if batch_first else x.transpose(0, 1) for key, x in full.items()}

    def loss(output: Tensor, target: Any) -> Tensor:
        return (output - 1).square().mean()

    expected = lr.calibrate(model, [plain], loss=loss)
    stats = lr.calibrate(model, [full | masks], loss=loss)
    assert stats.samples == 9
    for name, want in expected.items():
        assert stats[name].inputs.rows == want.inputs.rows, name
        assert torch.allclose(stats[name].inputs.second, want.inputs.second, rtol=1e-8, atol=1e-10), name
        scale = 1 if batch_first else (9 / len(plain["src"])) ** 2  # unpadded, time is taken for the batch
        assert torch.allclose(stats[name].gradients, scale * want.gradients, rtol=1e-6, atol=1e-12), name


def test_a_mask_for_other_models_and_targets_of_minus_100():
    """A mask by function, by key and by targets: all the same."""
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 60)).double()
    x, y = torch.randn(BATCH, LENGTH, 6).double(), tokens()
    wide, labels = F.pad(x, (0, 0, 0, PADDING), value=9.0), padded(y, value=-100)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    expected = lr.calibrate(model, [(x, y)], loss=loss)
    check_same(lr.calibrate(model, [(wide, labels)], loss=loss), expected)
    by_function = lr.calibrate(model, [(wide, labels)], loss=loss, mask=lambda batch: batch[1] != -100)
    check_same(by_function, expected)
    sampled = lr.calibrate(model, [(x, y)], loss=lr.SampledCrossEntropy())
    check_same(lr.calibrate(model, [(wide, labels)], loss=lr.SampledCrossEntropy()), sampled)

    class ByKey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            return self.inner(x)

    batch = {"x": wide, "valid": labels != -100}
    stats = lr.calibrate(ByKey(), [batch], loss=lr.SampledCrossEntropy(), mask="valid")
    assert stats["inner.0"].inputs.rows == BATCH * LENGTH
    assert torch.allclose(stats["inner.2"].gradients, sampled["2"].gradients)


@pytest.mark.parametrize("mask", [3, "valid", lambda batch: None, lambda batch: torch.ones(4)])
def test_what_is_no_mask_is_refused(mask):
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(lr.LowRankError, match="mask"):
        lr.calibrate(model, [torch.randn(3, 4, 6)], mask=mask)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_batch_of_nothing_but_padding_is_refused():
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(lr.LowRankError, match="every position of a batch is padding"):
        lr.calibrate(model, [torch.randn(3, 4, 6)], lr.SampledCrossEntropy(), mask=lambda x: torch.zeros(3, 4))


def test_labels_without_an_attention_mask_end_a_sample_but_hide_no_prompt():
    """A causal model padded at the right; the prompt's labels are -100 as well, and it is data."""
    model, ids = built("Llama", "ForCausalLM", SIZES), tokens()
    labels = ids.clone()
    labels[:, :2] = -100
    expected = lr.calibrate(model, [{"input_ids": ids, "labels": labels}], loss=lambda output, _: output.loss)
    batch = {"input_ids": padded(ids, value=7), "labels": padded(labels, value=-100)}
    stats = lr.calibrate(model, [batch], loss=lambda output, _: output.loss)
    assert stats["lm_head"].inputs.rows == BATCH * LENGTH
    check_same(stats, expected)


@pytest.mark.parametrize("init", [lr.EVA, lr.CorDA, lr.LoRAGA])
def test_adapters_that_start_from_data_start_the_same(init):
    model, ids = built("Bert", "ForTokenClassification", SIZES).float(), tokens()
    ones = torch.ones_like(ids)
    batches = [{"input_ids": ids, "attention_mask": ones}]
    wide = [{"input_ids": padded(ids, value=7), "attention_mask": padded(ones)}]
    states = []
    for data in (batches, wide):
        adapted, loss = copy.deepcopy(model), lr.SampledCrossEntropy()
        if init is lr.LoRAGA:
            known = lr.weight_gradients(adapted, data, loss, target=["query"])
        else:
            known = lr.calibrate(adapted, data)
        lr.add_lora_(adapted, ["query"], rank=2, init=init(known))
        states.append(adapted(**batches[0]).logits)
        weights = [p for name, p in adapted.named_parameters() if p.requires_grad and p.ndim == 2 and p.abs().sum() > 0]
        states[-1] = torch.cat([(p.mT @ p).flatten() if len(p) < p.shape[1] else (p @ p.mT).flatten() for p in weights])
    assert torch.allclose(states[0], states[1], rtol=1e-3, atol=1e-5)


def test_subspaces_of_keys_and_values_are_the_same():
    model, ids = built("Llama", "ForCausalLM", SIZES), tokens()
    ones = torch.ones_like(ids)
    bases = []
    for side in (None, "left", "right"):
        batch = {"input_ids": ids, "attention_mask": ones}
        if side is not None:
            batch = {"input_ids": padded(ids, side, 7), "attention_mask": padded(ones, side)}
        stats = lr.calibrate(model, [batch])
        found = lr.kv_subspaces(model, stats, lr.KVSettings(rank=2), head_size=8)
        bases.append(torch.stack([part.basis @ part.basis.mT for pair in found for part in pair]))
    assert torch.allclose(bases[1], bases[0], atol=1e-4)
    assert torch.allclose(bases[2], bases[0], atol=1e-4)


@pytest.mark.parametrize("how", ["attention_mask", "mask"])
def test_the_regression_in_sequence_leaves_padding_out(how):
    if how == "mask":
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6)).double()
        x = torch.randn(8, 5, 12).double()
        data, wide = [x], [F.pad(x, (0, 0, 0, 4), value=5.0)]
        settings = {"mask": lambda batch: torch.arange(batch.shape[1]).expand(len(batch), -1) < 5}
    else:
        model, ids = built("Bert", "ForTokenClassification", SIZES), torch.randint(3, 60, (16, LENGTH))
        ones = torch.ones_like(ids)
        data = [{"input_ids": ids, "attention_mask": ones}]
        wide = [{"input_ids": padded(ids, value=7), "attention_mask": padded(ones)}]
        settings = {}
    results = []
    for batches, more in ((data, {}), (wide, settings)):
        small = copy.deepcopy(model)
        stats = lr.calibrate(small, batches, lr.SampledCrossEntropy(), **more)
        plan = lr.make_plan(small, rank=3, stats=stats, methods=[lr.SVDMethod()])
        lr.factorize_(small, plan, stats=stats, data=batches)
        output = small(data[0]) if how == "mask" else small(**data[0]).logits
        results.append(output.detach())
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_samples_of_a_waveform_are_followed_through_convolutions():
    """What a strided convolution puts out has positions of its own."""
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    settings = SIZES | convolutions | {"vocab_size": 12, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
    settings |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    model, waves = built("Wav2Vec2", "ForCTC", settings), torch.randn(BATCH, 300).double()
    ones = torch.ones(BATCH, 300).long()
    expected = lr.calibrate(model, [{"input_values": waves, "attention_mask": ones}], loss=lr.SampledCrossEntropy())
    batch = {"input_values": padded(waves, by=130), "attention_mask": padded(ones, by=130)}
    check_same(lr.calibrate(model, [batch], loss=lr.SampledCrossEntropy()), expected)


@pytest.mark.parametrize("by", [3, 5])
def test_a_mask_of_text_is_not_one_of_images(by):
    """A text padded to ten tokens beside an image of ten patches."""
    tower = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
    text = tower | {"vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 59}
    settings = {"text_config": text, "vision_config": tower | {"image_size": 24, "patch_size": 8}, "projection_dim": 8}
    model, ids = built("CLIP", "Model", settings), tokens()
    ids[:, -1] = 59
    images, ones = torch.randn(BATCH, 3, 24, 24).double(), torch.ones_like(ids)

    def loss(output: Any, target: Any) -> Tensor:
        return output.text_embeds.sum() + output.image_embeds.square().mean() + output.logits_per_text.mean()

    batch = {"input_ids": ids, "attention_mask": ones, "pixel_values": images}
    expected = lr.calibrate(model, [batch], loss=loss)
    batch = {"input_ids": padded(ids, value=7, by=by), "attention_mask": padded(ones, by=by), "pixel_values": images}
    check_same(lr.calibrate(model, [batch], loss=loss), expected)
