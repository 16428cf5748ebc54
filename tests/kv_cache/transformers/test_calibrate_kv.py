"""Calibration of a whole model's cache: head sizes and rotations are the model's, the first tokens do not count."""

import pytest
import torch
from transformers import DynamicCache

import lowrank_layers as lr

from .caches import WARNINGS
from .tiny_models import SIZE, tiny

pytestmark = WARNINGS
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
PLAIN = {kind: [True, True] for kind in ("llama", "qwen2", "mistral", "gemma", "gemma2", "cohere", "gpt_oss")}
PLAIN |= {"opt": [False, False], "smollm3": [True, False], "cohere2": [True, False]}
"""Models, and which of their two layers rotate keys."""


def second_moment(transform):
    basis = transform.basis.double()
    return basis * transform.variances.double()[..., None, :] @ basis.mT


def cached(net, ids):
    """Keys and values that the first layer hands to its cache."""
    with torch.no_grad():
        layer = net(ids, past_key_values=DynamicCache()).past_key_values.layers[0]
    return layer.keys.double(), layer.values.double()


@pytest.mark.parametrize("kind", PLAIN)
def test_transforms_are_those_of_what_the_model_caches(kind):
    net = tiny(kind)
    found = lr.calibrate_kv(net, [IDS], lr.KVSettings(bits=2, keep_first=3))
    keys, values = cached(net, IDS)
    assert (len(found), found.head_size, found.rope) == (2, SIZE, "tile")
    rotation = found.rotations[0]
    assert [each is not None for each in found.rotations] == PLAIN[kind]
    if rotation is not None:
        keys = rotation.turn(keys, -torch.arange(keys.shape[2]))
    keys, values = (x[:, :, 3:].transpose(1, 2).flatten(2).flatten(0, 1) for x in (keys, values))
    transform = found[0][0]
    torch.testing.assert_close(transform.mean[0, 0].double(), keys.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second_moment(found[0][1])[0, 0], values.mT @ values / len(values), atol=1e-5, rtol=1e-3)
    centred = (keys - keys.mean(0)).unflatten(-1, (-1, SIZE)).transpose(0, 1)
    offsets = [d - 15.5 for d in range(32)] if rotation is not None else [0.0]
    seen = 0
    for offset in offsets:
        rows = centred if rotation is None else rotation.turn(centred, torch.full((len(keys),), offset))
        rows = rows.transpose(0, 1).flatten(1)
        seen = seen + rows.mT @ rows / len(rows) / len(offsets)
    torch.testing.assert_close(second_moment(transform)[0, 0], seen, atol=1e-5, rtol=1e-3)
    for each in found[0]:
        basis = each.basis.double()
        eye = torch.eye(basis.shape[-1]).double().expand_as(basis)
        torch.testing.assert_close(basis.mT @ each.metric.double() @ basis, eye, atol=1e-3, rtol=0)


@pytest.mark.parametrize("batch", ["a mask that hides nothing", "padding"])
def test_the_first_tokens_and_padding_do_not_count(batch):
    net, settings = tiny("llama"), lr.KVSettings(bits=2, rope="before")
    plain = lr.calibrate_kv(net, [IDS], settings)
    ids, mask = IDS, torch.ones_like(IDS)
    if batch == "padding":  # of what a mask shows, the first tokens do count
        settings = lr.KVSettings(bits=2, rope="before", keep_first=0)
        plain = lr.calibrate_kv(net, [IDS], settings)
        ids, mask = (torch.nn.functional.pad(x, (0, 5)) for x in (ids, mask))
    masked = lr.calibrate_kv(net, [{"input_ids": ids, "attention_mask": mask}], settings)
    for one, other in zip((t for pair in plain for t in pair), (t for pair in masked for t in pair), strict=True):
        torch.testing.assert_close(one.mean, other.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.variances, other.variances, atol=1e-6, rtol=1e-2)


def test_only_what_is_needed_is_calibrated_and_the_model_is_left_alone(monkeypatch):
    net = tiny("llama").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    taken = []

    def spy(model, stats, *args, **options):
        taken.extend(stats)
        return lr.kv_subspaces(model, stats, *args, **options)

    monkeypatch.setitem(lr.calibrate_kv.__globals__, "kv_subspaces", spy)
    lr.calibrate_kv(net, [IDS])
    assert {name.rpartition(".")[2] for name in taken} == {"k_proj", "v_proj"}
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_models_without_such_projections_are_refused():
    for kind in ("gpt2", "gpt_neox"):
        with pytest.raises(lr.LowRankError, match="queries, keys and values at once"):
            lr.calibrate_kv(tiny(kind), [IDS])
    for kind in ("qwen3", "gemma3", "olmo2"):
        with pytest.raises(lr.LowRankError, match="more than rotate what k_proj puts out"):
            lr.calibrate_kv(tiny(kind), [IDS])
    with pytest.raises(lr.LowRankError, match="one for each layer"):
        lr.calibrate_kv(torch.nn.Linear(3, 3), [IDS])
    with pytest.raises(lr.LowRankError, match="with a rank"):
        lr.calibrate_kv(tiny("llama"), [IDS], lr.KVSettings(rank=4))
    with pytest.raises(lr.LowRankError, match="token ids"):
        lr.calibrate_kv(tiny("llama"), [{"position_ids": IDS}])
    with pytest.raises(lr.LowRankError, match="list of batches"):
        lr.calibrate_kv(tiny("llama"), IDS)
    with pytest.raises(lr.LowRankError, match="no batches"):
        lr.calibrate_kv(tiny("llama"), [])
