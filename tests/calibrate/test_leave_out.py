"""The first and last tokens of each sample are counted as padding is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank_layers as lr

from .test_padding import MODELS, PAIRS, SIZES, built, check_same, padded, tokens


def without(first: int, last: int, length: int) -> torch.Tensor:
    place = torch.arange(length)
    return ((place >= first) & (place < length - last)).expand(3, -1)


def test_tokens_are_counted_from_the_ends_of_what_is_data():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]) > 0
    want = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]) > 0
    assert torch.equal(lr.LeaveOut(first=1, last=2).narrow(mask), want)


@pytest.mark.parametrize("folder", [None, "stages"])
def test_without_masks_all_positions_have_data(folder, tmp_path):
    """The same as a mask that the user makes."""
    model, ids = built("Llama", "ForCausalLM", SIZES), tokens(7)
    where = {} if folder is None else {"folder": tmp_path / folder}
    got = lr.calibrate(model, [{"input_ids": ids}], lr.SampledCrossEntropy(), mask=lr.LeaveOut(2, 1), **where)
    by_hand = {"mask": lambda _: without(2, 1, 7)}
    check_same(got, lr.calibrate(model, [{"input_ids": ids}], lr.SampledCrossEntropy(), **by_hand))
    assert got["model.layers.1.mlp.up_proj"].inputs.rows == 3 * 4


@pytest.mark.parametrize("kind", ["bert", "xlnet", "llama left", "llama right", "gpt2"])
def test_padding_makes_no_difference(kind):
    family, head, settings, side = MODELS[kind]
    model, ids = built(family, head, settings), tokens()
    ones, mask = torch.ones_like(ids), lr.LeaveOut(first=1, last=1)
    plain, batch = {"input_ids": ids}, {"input_ids": padded(ids, side, 7), "attention_mask": padded(ones, side)}
    expected = lr.calibrate(model, [plain | {"attention_mask": ones}], lr.SampledCrossEntropy(), mask=mask)
    check_same(lr.calibrate(model, [batch], lr.SampledCrossEntropy(), mask=mask), expected)
    check_same(lr.calibrate(model, [plain], lr.SampledCrossEntropy(), mask=mask), expected)
    assert min(layer.inputs.rows for layer in expected.values()) >= 3  # positions of embeddings among them


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("given", ["decoder_input_ids", "labels"])
def test_an_encoder_and_a_decoder_leave_out_their_own(kind, given):
    family, settings = PAIRS[kind]
    model, ids, target = built(family, "ForConditionalGeneration", settings), tokens(6), tokens(4)
    mask = lr.LeaveOut(first=1)
    whole = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(target)}
    plain = {"input_ids": ids, given: target}
    expected = lr.calibrate(model, [plain | whole], lr.SampledCrossEntropy(), mask=mask)
    check_same(lr.calibrate(model, [plain], lr.SampledCrossEntropy(), mask=mask), expected)
    assert {layer.inputs.rows for layer in expected.values()} >= {3 * 5, 3 * 3}
    if given == "labels":
        more = {"input_ids": padded(ids, value=7), "attention_mask": padded(whole["attention_mask"])}
        more |= {"labels": padded(target, value=-100)}
        check_same(lr.calibrate(model, [more], lr.SampledCrossEntropy(), mask=mask), expected)


def test_labels_tell_where_a_sample_ends():
    model = nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 60))
    ids, mask = tokens(7), lr.LeaveOut(last=2)
    batch = padded(ids, value=7), padded(ids, value=-100)
    got, expected = (lr.calibrate(model, [pair], lr.SampledCrossEntropy(), mask=mask) for pair in (batch, (ids, ids)))
    check_same(got, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_features_that_vary_in_time(batch_first):
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    stats = lr.calibrate(model, [x], mask=lr.LeaveOut(first=2))
    kept = (x if batch_first else x.transpose(0, 1))[:, 2:].reshape(-1, 8).double()
    for name in ("self_attn.q_proj", "linear1"):
        assert stats[name].inputs.rows == 9
    assert torch.allclose(stats["self_attn.q_proj"].inputs.second, kept.mT @ kept / 9, atol=1e-6)


def test_a_file_keeps_it(tmp_path):
    model = nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 60))
    mask = lr.LeaveOut(first=1)
    lr.calibrate(model, [tokens()], mask=mask).save(tmp_path / "stats.safetensors")
    loaded = lr.Statistics.load(tmp_path / "stats.safetensors")
    assert loaded.mask == mask
    lr.factorize_(model, lr.make_plan(model, rank=2, stats=loaded), stats=loaded, data=[tokens()])


def test_a_folder_of_another_setting_is_refused(tmp_path):
    model, batches = nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 60)), [tokens()]
    lr.calibrate(model, batches, mask=lr.LeaveOut(1), folder=tmp_path / "stages")
    with pytest.raises(lr.LowRankError, match="other batches"):
        lr.calibrate(model, batches, mask=lr.LeaveOut(2), folder=tmp_path / "stages")


def test_inputs_without_positions_are_refused():
    with pytest.raises(lr.LowRankError, match=r"float32 \[2, 3, 8, 8\]"):
        lr.calibrate(nn.Sequential(nn.Conv2d(3, 4, 3)), [torch.randn(2, 3, 8, 8)], mask=lr.LeaveOut(1))
    with pytest.raises(lr.LowRankError, match="got last=-1"):
        lr.LeaveOut(last=-1)
