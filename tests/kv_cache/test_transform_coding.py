"""Transform coding through the whole of a cache: attention, growth, drift, calibrated directions, budgets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr
from lowrank_layers.kv_cache import bit_coefficients, serialize
from lowrank_layers.kv_cache.bit_allocation import distortion
from lowrank_layers.kv_cache.bit_fit import plan_bits
from lowrank_layers.kv_cache.first_fits import FirstFits
from lowrank_layers.kv_cache.tile_frame import TileFrame
from lowrank_layers.kv_cache.transform import Transform

SIZE, HEADS = 16, 2
CPU = torch.device("cpu")
ROTATION = lr.Rotation.of(SIZE)


def tokens(count: int, seed: int = 0, batch: int = 1, mix: int = 7) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of few directions, of which those of one seed of ``mix`` have one distribution."""
    width = SIZE * HEADS
    scales = torch.logspace(0, -2, width)
    found = []
    for side in (0, 1):
        turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(10 * mix + side)))[0]
        rows = torch.randn(batch, count, width, generator=torch.Generator().manual_seed(2 * seed + side)) * scales
        found.append((rows @ turn).unflatten(-1, (HEADS, SIZE)).transpose(1, 2))
    return ROTATION.turn(found[0] + 1, torch.arange(count)), found[1]


def filled(count: int = 400, *, batch: int = 1, **changes: object) -> lr.LowRankKV:
    cache = lr.LowRankKV(rotation=ROTATION, **{"bits": 3, **changes})
    cache.append(*tokens(count, batch=batch))
    cache.compress()
    return cache


def error(cache: lr.LowRankKV, side: int, count: int = 400) -> float:
    exact = tokens(count)[side]
    return float((cache.dense()[side] - exact).square().sum() / exact.square().sum())


def test_bits_are_the_default_and_a_rank_keeps_its_own():
    assert lr.LowRankKV(rotation=ROTATION).settings.mean_bits == lr.KVSettings().mean_bits
    assert filled().old[0].parts[0].coefficients.dtype == torch.uint8
    by_rank = lr.KVSettings(rank=8)
    assert (by_rank.recent, by_rank.at_first, by_rank.block_on(CPU), by_rank.rotated) == (128, 64, 64, "before")
    by_bits = lr.KVSettings()
    assert (by_bits.recent, by_bits.at_first, by_bits.block_on(CPU), by_bits.rotated) == (16, 16, 4, "tile")
    assert by_bits.block_on(torch.device("cuda")) == 64
    assert lr.KVSettings(block=5).at_first == lr.KVSettings(block=5).block_on(CPU) == 5
    assert lr.KVSettings(dtype=torch.int8).rank_of(values=True) == 16


@pytest.mark.parametrize("rope", ["tile", "before", "after"])
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_attention_over_levels_is_attention_to_what_they_stand_for(rope, joint, count):
    cache = filled(rope=rope, joint=joint, batch=2)
    query = torch.randn(2, 3 * HEADS, count, SIZE)
    mask = torch.ones(count, 400, dtype=torch.bool).tril(400 - count)
    expected = F.scaled_dot_product_attention(query, *cache.dense(), mask, enable_gqa=True)
    torch.testing.assert_close(cache.attend(query), expected, atol=1e-4, rtol=1e-4)


def test_a_rank_in_the_frame_of_tiles_attends_likewise_and_loses_less_than_after_rotation():
    cache = filled(bits=None, rank=SIZE, rope="tile")
    for dense, exact in zip(cache.dense(), tokens(400), strict=True):
        torch.testing.assert_close(dense, exact, atol=1e-4, rtol=1e-4)
    errors = {rope: error(filled(bits=None, rank=6, rope=rope), 0) for rope in ("before", "tile", "after")}
    assert errors["before"] <= errors["tile"] < errors["after"]


def test_the_error_is_the_one_that_the_allocation_predicts():
    cache, variances = filled(3000, bits=2.5, keep_first=0), torch.logspace(0, -2, SIZE * HEADS).square()
    (part,) = cache.old[1].parts
    predicted = distortion(variances, part.coefficients.widths) / float(variances.sum())
    count = part.coefficients.tokens
    exact = tokens(3000)[1][:, :, :count]
    lost = float((cache.dense()[1][:, :, :count] - exact).square().sum() / exact.square().sum())
    # gains of tokens make it a little less
    assert 0.6 * predicted < lost < 1.1 * predicted
    assert cache.old[1].discarded == pytest.approx(lost, rel=0.1)


def test_more_bits_lose_less_and_take_more():
    caches = [filled(1000, bits=bits) for bits in (1, 2, 4, 8)]
    for side in (0, 1):
        errors = [error(cache, side, 1000) for cache in caches]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3
    sizes = [cache.nbytes() for cache in caches]
    assert sizes == sorted(sizes)


def test_bits_lose_less_than_a_rank_of_as_many_bytes():
    by_bits = filled(1000, bits=2)
    by_rank = filled(1000, bits=None, rank=4, dtype=torch.int8, keep_recent=16, block=16)
    assert by_bits.nbytes() <= by_rank.nbytes() * 1.1
    assert all(error(by_bits, side, 1000) < 0.7 * error(by_rank, side, 1000) for side in (0, 1))


def test_tokens_that_come_later_grow_by_blocks_and_survive_a_file_and_cuts():
    cache, (keys, values) = filled(), tokens(460, seed=0)
    for at in range(400, 460):
        cache.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        cache.compress()
    assert 400 < cache.compressed + 4 <= 460 - 16
    whole = cache.dense()
    again = serialize.layer_from_tensors(*serialize.layer_to_tensors(cache), cache.settings, ROTATION)
    assert all(torch.equal(a, b) for a, b in zip(again.dense(), whole, strict=True))
    query = torch.randn(1, HEADS, 1, SIZE)
    torch.testing.assert_close(again.attend(query), cache.attend(query))
    cache.repeat(2)
    cache.select(torch.tensor([1]))
    cache.crop(333)
    for side, expected in zip(cache.dense(), whole, strict=True):
        torch.testing.assert_close(side, expected[:, :, :333])
    expected = F.scaled_dot_product_attention(query, *cache.dense())
    torch.testing.assert_close(cache.attend(query), expected, atol=1e-4, rtol=1e-4)


def test_a_copy_that_was_attended_to_goes_its_own_way():
    cache, more = filled(block=4), tokens(40, seed=1)
    query = torch.randn(1, HEADS, 1, SIZE)
    for start in (0, 20):
        for side in (cache, again := copy.deepcopy(cache)):
            side.append(*(x[:, :, start : start + 20] for x in more))
            side.compress()
            expected = F.scaled_dot_product_attention(query, *side.dense())
            torch.testing.assert_close(side.attend(query), expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(side.dense()[1], cache.dense()[1])
        again.crop(100)
        assert len(cache) == 420 + start


def test_directions_are_fitted_again_when_tokens_become_unlike():
    frozen, fresh = (filled(keep_recent=0, refresh=refresh) for refresh in (None, 2.0))
    _, values = tokens(400, seed=3, mix=8)
    keys = ROTATION.turn(ROTATION.turn(tokens(400, seed=3, mix=8)[0], -torch.arange(400)), torch.arange(400, 800))
    for cache in (frozen, fresh):
        for at in range(0, 400, 50):
            cache.append(keys[:, :, at : at + 50], values[:, :, at : at + 50])
            cache.compress()
    lost = [float((cache.dense()[1][:, :, 400:] - values).square().sum()) for cache in (frozen, fresh)]
    assert lost[1] < 0.5 * lost[0]


def test_an_outlier_among_small_blocks_does_not_fit_directions_again_but_a_change_does():
    cache = filled(keep_recent=0, block=4)
    directions = [part.subspace for side in cache.old for part in side.parts]
    same, unlike = tokens(400, seed=3), tokens(400, seed=4, mix=8)
    at = torch.arange(400)
    sides = [(ROTATION.turn(ROTATION.turn(keys, -at), at + 400), values) for keys, values in (same, unlike)]

    def add(keys: Tensor, values: Tensor, count: int) -> list[bool]:
        for token in range(count):
            cache.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
            cache.compress()
        return [
            part.subspace is old
            for part, old in zip((p for side in cache.old for p in side.parts), directions, strict=True)
        ]

    assert all(add(*(torch.cat([x[:, :, :1], y[:, :, 1:]], 2) for x, y in zip(sides[1], sides[0], strict=True)), 128))
    assert not any(add(*sides[1], 128))


def test_a_file_holds_what_drift_has_been_seen():
    one, two = filled(keep_recent=0, block=4), filled(keep_recent=0, block=4)
    keys, values = tokens(480, seed=4, mix=8)
    for at in range(400, 480, 4):
        if at == 440:
            two = serialize.layer_from_tensors(*serialize.layer_to_tensors(two), two.settings, ROTATION)
        for cache in (one, two):
            cache.append(keys[:, :, at : at + 4], values[:, :, at : at + 4])
            cache.compress()
    for before, after in zip(one.old, two.old, strict=True):
        assert torch.equal(before.parts[0].subspace.basis, after.parts[0].subspace.basis)
    assert not torch.equal(two.old[1].parts[0].subspace.basis, filled().old[1].parts[0].subspace.basis)


def test_what_no_directions_hold_does_not_fit_them_again_and_again():
    cache, fits = filled(keep_recent=0, block=4), []
    noise = torch.randn(2, 1, HEADS, 2000, SIZE)
    for at in range(0, 2000, 4):
        cache.append(*noise[:, :, :, at : at + 4])
        cache.compress()
        fits.append([part.subspace for side in cache.old for part in side.parts])
    assert all(1 < len(set(side)) <= 6 for side in zip(*fits, strict=True))


def calibrated(mix: int = 7) -> tuple[Transform, Transform]:
    cache = lr.LowRankKV(rotation=ROTATION, keep_recent=0, keep_first=0)
    cache.append(*tokens(3000, seed=5, mix=mix))
    keys, values = cache.fits.transforms(cache.leaving(0, 3000), cache.frame(), None)
    eye = torch.eye(SIZE * HEADS)[None, None]
    return (
        Transform.fit(keys.mean, keys.basis * keys.variances[..., None, :] @ keys.basis.mT, eye),
        Transform.fit(values.mean, values.basis * values.variances[..., None, :] @ values.basis.mT, eye),
    )


def test_calibrated_directions_take_no_bytes_and_serve_other_tokens():
    own, shared = filled(), lr.LowRankKV(rotation=ROTATION, subspaces=calibrated(), bits=3)
    shared.append(*tokens(400))
    shared.compress()
    assert all(part.subspace.shared for side in shared.old for part in side.parts)
    assert shared.nbytes() < own.nbytes()
    assert all(error(shared, side) < 2 * error(own, side) for side in (0, 1))


def test_tokens_unlike_the_calibrated_ones_get_directions_of_their_own_where_that_loses_less():
    unlike = calibrated(mix=9)
    caches = [lr.LowRankKV(rotation=ROTATION, subspaces=unlike, bits=4, refresh=refresh) for refresh in (None, 2.0)]
    for cache in caches:
        cache.append(*tokens(400))
        cache.compress()
    assert [all(part.subspace.shared for part in cache.old[1].parts) for cache in caches] == [True, False]
    assert error(caches[1], 1) < 0.5 * error(caches[0], 1)


@pytest.mark.parametrize("count", [150, 250, 400, 800])
def test_directions_of_their_own_are_paid_for(count):
    caches = [lr.LowRankKV(rotation=ROTATION, subspaces=calibrated(mix=9), bits=4, refresh=r) for r in (None, 2.0)]
    for cache in caches:
        cache.append(*tokens(count))
        cache.compress()
    assert not all(part.subspace.shared for side in caches[1].old for part in side.parts)
    assert caches[1].nbytes() <= caches[0].nbytes()


def test_a_budget_shares_bits_and_is_kept():
    layers = [lr.LowRankKV(rotation=ROTATION) for _ in range(3)]
    for scale, layer in enumerate(layers):
        keys, values = tokens(600, seed=scale, mix=scale)
        layer.append(keys, values * 10**scale)
    exact = sum(side.nbytes for layer in layers for side in layer.dense())
    lr.compress_together(layers, 0.25)
    used = sum(layer.nbytes() for layer in layers)
    assert 0.22 * exact < used <= 0.25 * exact
    # errors count as parts of a layer's energy: as many bits whatever the scale
    spent = [
        sum(8 * w[0] + 4 * w[1] + 3 * w[2] + 2 * w[3] + w[4] for side in layer.fits.budgeted.widths for w in side)
        for layer in layers
    ]
    assert max(spent) - min(spent) <= 0.05 * max(spent)


def test_the_kind_of_directions_has_to_fit_the_settings():
    with pytest.raises(lr.LowRankError, match="expected Transforms with bits"):
        lr.LowRankKV(rank=4, rotation=ROTATION, subspaces=calibrated())
    with pytest.raises(lr.LowRankError, match="got bits=3 and rank=4"):
        lr.LowRankKV(bits=3, rank=4)
    with pytest.raises(lr.LowRankError, match="got bits=9"):
        lr.LowRankKV(bits=9)


def test_calibrated_directions_go_where_the_keys_are():
    (plan,) = plan_bits([calibrated()], 3, shared=True)
    for device in (torch.device("meta"), torch.device("cpu")):
        for fit in plan.fits(None, None, device):
            assert fit.made is not None
            ((subspace, store),) = fit.made
            assert {subspace.basis.device.type, subspace.scale.device.type, store.weights.device.type} == {device.type}


def test_what_is_kept_in_inference_mode_serves_gradients_later():
    bit_coefficients._centres.cache_clear()
    bit_coefficients._gains.cache_clear()
    pair, exact = calibrated(), tokens(400)
    (plan,) = plan_bits([pair], 3, shared=True)
    with torch.inference_mode():
        first = lr.LowRankKV(rotation=lr.Rotation.of(SIZE))
        first.fits.plan = plan
        first.append(*exact)
        first.compress()
    cache = lr.LowRankKV(rotation=lr.Rotation.of(SIZE))
    cache.fits.plan = plan
    cache.append(*exact)
    cache.compress()
    query = torch.randn(1, HEADS, 1, SIZE, requires_grad=True)
    cache.attend(query).square().sum().backward()
    own = query.grad.clone()
    query.grad = None
    F.scaled_dot_product_attention(query, *cache.dense()).square().sum().backward()
    torch.testing.assert_close(own, query.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "heads", "size", "together"),
    [
        ({}, 4, 64, 4),
        ({}, 2, 128, 2),
        ({}, 5, 64, 1),
        ({"joint": True}, 8, 128, 8),
        ({"joint": False}, 2, 8, 1),
        ({"rank": 4}, 8, 128, 8),
        ({"rank": 4, "joint": False}, 8, 128, 1),
    ],
)
def test_heads_share_directions_where_they_are_few(changes, heads, size, together):
    assert lr.KVSettings(**changes).together(heads, size) == together


def test_many_heads_are_stored_as_if_they_were_told_apart():
    keys, values = torch.randn(2, 1, 8, 90, 40, generator=torch.Generator().manual_seed(0))
    made = []
    for joint in (None, False):
        cache = lr.LowRankKV(lr.KVSettings(joint=joint), lr.Rotation.of(40))
        cache.append(keys, values)
        cache.compress()
        made.append(cache)
    default, apart = made
    assert default.nbytes() == apart.nbytes()
    assert torch.equal(default.side(0), apart.side(0))
    assert torch.equal(default.side(1), apart.side(1))


def test_directions_that_heads_share_are_taken_as_they_are():
    """Settings that leave it open take joint directions for many heads, and a budget counts them as such."""
    keys, values = torch.randn(2, 1, 8, 90, 40, generator=torch.Generator().manual_seed(0))
    rotation, settings = lr.Rotation.of(40), lr.KVSettings(joint=True)
    fitted = FirstFits(settings).transforms((keys, values), TileFrame(rotation, 40), None)
    made = []
    for joint in (None, True):
        cache = lr.LowRankKV(lr.KVSettings(joint=joint), rotation, fitted)
        cache.append(keys, values)
        lr.compress_together([cache], 0.3)
        made.append(cache)
    left_open, shared = made
    assert left_open.nbytes() == shared.nbytes() <= 0.3 * (keys.nbytes + values.nbytes)
    assert torch.equal(left_open.side(0), shared.side(0))
