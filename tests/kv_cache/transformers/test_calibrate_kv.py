"""Calibration of a whole model's cache: the moments of what the model caches, and of the loss's gradients there."""

import pytest
import torch
from transformers import DynamicCache

import lowrank_layers as lr
from lowrank_layers.kv_cache.transform import DAMPING

from .caches import WARNINGS
from .tiny_models import KINDS, LATENT, SIZE, tiny

pytestmark = WARNINGS
IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
LATENTS = sorted(kind for kind, (_, sizes) in KINDS.items() if sizes.items() >= LATENT.items())
ROTATED = {"gpt2": [False, False], "opt": [False, False], "smollm3": [True, False], "cohere2": [True, False]}
"""Which of the two layers rotate keys, where not both do."""


def second_moment(transform):
    basis = transform.basis.double()
    return basis * transform.variances.double()[..., None, :] @ basis.mT


def transforms(found):
    return [each for pair in found for each in pair]


def cached(net, ids):
    """Keys and values that the first layer hands to its cache."""
    with torch.no_grad():
        layer = net(ids, past_key_values=DynamicCache()).past_key_values.layers[0]
    return layer.keys.double(), layer.values.double()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(LATENTS)))
def test_transforms_are_those_of_what_the_model_caches(kind):
    net = tiny(kind)
    found = lr.calibrate_kv(net, [IDS[:1], IDS[1:]], lr.KVSettings(bits=2, keep_first=3))
    keys, values = cached(net, IDS)
    assert (len(found), found.head_size, found.rope) == (2, SIZE, "tile")
    assert [each is not None for each in found.rotations] == ROTATED.get(kind, [True, True])
    rotation = found.rotations[0]
    if rotation is not None:
        keys = rotation.turn(keys, -torch.arange(keys.shape[2]))
    keys, values = (x[:, :, 3:].transpose(1, 2).flatten(2).flatten(0, 1) for x in (keys, values))
    torch.testing.assert_close(found[0][0].mean[0, 0].double(), keys.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second_moment(found[0][1])[0, 0], values.mT @ values / len(values), atol=1e-5, rtol=1e-3)
    centred = (keys - keys.mean(0)).unflatten(-1, (-1, SIZE)).transpose(0, 1)
    offsets = [d - 15.5 for d in range(32)] if rotation is not None else [0.0]
    seen = 0
    for offset in offsets:
        rows = centred if rotation is None else rotation.turn(centred, torch.full((len(keys),), offset))
        rows = rows.transpose(0, 1).flatten(1)
        seen = seen + rows.mT @ rows / len(rows) / len(offsets)
    torch.testing.assert_close(second_moment(found[0][0])[0, 0], seen, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "smollm3"])
@pytest.mark.parametrize("rope", ["before", "tile"])
@pytest.mark.parametrize("joint", [True, False])
def test_transforms_are_those_of_the_projections_moments(kind, rope, joint):
    net, settings = tiny(kind), lr.KVSettings(bits=2, rope=rope, joint=joint)
    found = lr.calibrate_kv(net, [IDS], settings)
    rotation = lr.calibrate_kv(net, [IDS], lr.KVSettings(bits=2)).rotations
    stats = lr.calibrate(
        net,
        [IDS],
        lr.SampledCrossEntropy(1.0),
        target=["k_proj", "v_proj"],
        mask=lambda ids: torch.arange(ids.shape[1]).expand(ids.shape) >= 4,
    )
    others = lr.kv_subspaces(net, stats, settings, head_size=SIZE, rotation=rotation)
    assert len(found) == len(others) == 2
    for one, other in zip(transforms(found), transforms(others), strict=True):
        scale = float(other.variances.max())
        torch.testing.assert_close(one.mean, other.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.variances, other.variances, atol=1e-4 * scale, rtol=1e-3)
        torch.testing.assert_close(one.metric, other.metric, atol=1e-4 * float(other.metric.abs().max()), rtol=1e-3)


def test_variances_are_in_nats_per_token():
    """The second-order increase of the Kullback-Leibler divergence, for noise of a given covariance in one layer."""
    net = tiny("gpt2", initializer_range=0.3).double()
    ids = torch.randint(3, 90, (64, 12), generator=torch.Generator().manual_seed(1))
    found = lr.calibrate_kv(net, list(ids.repeat(8, 1).split(64)), lr.KVSettings(bits=2, keep_first=0))
    transform = found[1][1]
    attention = net.transformer.h[1].attn
    width = transform.mean.shape[-1]
    # the metric without what was added to it
    metric = transform.metric[0, 0].double()
    metric -= DAMPING / (1 + DAMPING) * metric.diagonal().mean() * torch.eye(width)
    basis = transform.basis[0, 0].double()
    # an error of standard deviation .05 along each direction
    cost = 0.05**2 / 2 * float((basis.mT @ metric @ basis).trace())
    noise = 0.05 * torch.randn(*ids.shape, width, dtype=torch.double) @ basis.mT
    with torch.no_grad():
        exact = net(ids).logits.log_softmax(-1)
        handle = attention.c_attn.register_forward_hook(
            lambda module, args, out: torch.cat([out[..., :-width], out[..., -width:] + noise], -1)
        )
        noisy = net(ids).logits.log_softmax(-1)
        handle.remove()
    divergence = float((exact.exp() * (exact - noisy)).sum(-1).mean())
    assert divergence == pytest.approx(cost, rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2", "cohere2", "gpt_oss"])
def test_a_cache_takes_the_transforms_that_were_saved_beside_the_model(kind, tmp_path):
    net = tiny(kind)
    made = lr.calibrate_kv(net, [IDS])
    made.save(tmp_path)
    errors = {}
    for bits in (2, 8):
        cache = lr.LowRankCache(bits=bits, subspaces=lr.KVTransforms.load(tmp_path), keep_recent=4, block=4)
        with torch.no_grad():
            net(IDS, past_key_values=cache)
        assert cache.layers[0].compressed == 32
        pairs = zip(cache.layers[0].kv.dense(), cached(net, IDS), strict=True)
        errors[bits] = [float((x - exact).norm() / exact.norm()) for x, exact in pairs]
    # a few times what the quantizers lose on Gaussians
    assert max(errors[8]) < 0.05
    assert max(errors[2]) < 1
    assert errors[8] < errors[2]
    with pytest.raises(lr.LowRankError, match="joint"):
        lr.LowRankCache(bits=2, subspaces=made, joint=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere2"])
def test_layers_of_which_nothing_is_worth_a_bit_are_read_as_their_mean(kind):
    net = tiny(kind)
    made = lr.calibrate_kv(net, [IDS])
    plans = made.plans(0.25)
    assert not all(sum(widths) for plan in plans for side in plan.widths for widths in side)
    logits = []
    for implementation in ("sdpa", "lowrank"):
        net.set_attn_implementation(implementation)
        cache = lr.LowRankCache(bits=0.25, subspaces=made, keep_recent=4, block=4)
        with torch.no_grad():
            net(IDS, past_key_values=cache)
            logits.append(net(IDS[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_first_tokens_behind_it_do_not_count(side):
    net, settings = tiny("llama"), lr.KVSettings(bits=2, rope="before")
    plain = lr.calibrate_kv(net, [IDS], settings)
    pad = (5, 0) if side == "left" else (0, 5)
    ids, mask = (torch.nn.functional.pad(x, pad) for x in (IDS, torch.ones_like(IDS)))
    masked = lr.calibrate_kv(net, [{"input_ids": ids, "attention_mask": mask}], settings)
    for one, other in zip(transforms(plain), transforms(masked), strict=True):
        if side == "right":  # behind padding on the left, keys keep one constant rotation, which variances do not feel
            torch.testing.assert_close(one.mean, other.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.variances, other.variances, atol=1e-3 * float(one.variances.max()), rtol=1e-3)


def test_the_model_is_left_alone():
    net = tiny("llama").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lr.calibrate_kv(net, [IDS])
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_a_model_in_half_precision_has_the_transforms_of_the_whole_one():
    net = tiny("llama")
    whole, half = lr.calibrate_kv(net, [IDS]), lr.calibrate_kv(net.bfloat16(), [IDS])
    for one, other in zip(transforms(whole), transforms(half), strict=True):
        assert other.basis.dtype == torch.float32
        error = second_moment(other) - second_moment(one)
        assert float(error.norm()) < 0.02 * float(second_moment(one).norm())


@pytest.mark.parametrize("kind", LATENTS)
def test_latents_are_refused(kind):
    net = tiny(kind)
    with torch.no_grad():
        keys = net(IDS).past_key_values.layers[0].keys
    if keys.shape[1] == 1:  # until 5.14 they are expanded
        with pytest.raises(lr.LowRankError, match="latents"):
            lr.calibrate_kv(net, [IDS])


def test_what_is_no_decoder_or_no_batch_is_refused():
    with pytest.raises(lr.LowRankError, match="expected a decoder of transformers"):
        lr.calibrate_kv(torch.nn.Linear(3, 3), [IDS])
    with pytest.raises(lr.LowRankError, match="rank=4"):
        lr.calibrate_kv(tiny("llama"), [IDS], lr.KVSettings(rank=4))
    with pytest.raises(lr.LowRankError, match="rope='after'"):
        lr.calibrate_kv(tiny("llama"), [IDS], lr.KVSettings(bits=2, rope="after"))
    for batch in ({"position_ids": IDS}, "text", IDS[0]):
        with pytest.raises(lr.LowRankError, match="token ids"):
            lr.calibrate_kv(tiny("llama"), [batch])
    with pytest.raises(lr.LowRankError, match="no gradient at the keys or values of layer 0"):
        lr.calibrate_kv(tiny("llama"), [IDS], loss=lambda output, target: output.logits.sum() * 0)
    with pytest.raises(lr.LowRankError, match="every position of a batch is padding"):
        lr.calibrate_kv(tiny("llama"), [IDS[:, :4]])
    broken = tiny("llama")
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(lr.LowRankError, match="NaN or Inf"):
        lr.calibrate_kv(broken, [IDS], loss=lambda output, target: output.logits.sum())
    with pytest.raises(lr.LowRankError, match="list of batches"):
        lr.calibrate_kv(tiny("llama"), IDS)
    with pytest.raises(lr.LowRankError, match=r"layers \[\]"):
        lr.calibrate_kv(tiny("llama"), [])
