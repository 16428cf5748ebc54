"""Rows that are padded on the left are stored, fitted and attended to as the same rows without padding."""

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers.kv_cache.rope import TILE_FRAME
from lowrank_layers.kv_cache.row_starts import RowStarts, seen_tokens
from lowrank_layers.kv_cache.subspace import Subspace

from .packed import integer_bound_of_attention

HEADS, SIZE, TOKENS, PADDING = 2, 16, 60, 13
ROTATION = lr.Rotation.of(SIZE)
KEEP = {"keep_recent": 8, "keep_first": 3, "block": 6}
SETTINGS = {
    "keys before RoPE": {},
    "keys after RoPE": {"rope": "after"},
    "per head": {"joint": False},
    "int8": {"dtype": torch.int8},
    "no first tokens": {"keep_first": 0},
    "more first tokens than padding": {"keep_first": 20},
    "fitted again": {"refresh": 1.0},
    "keys in their tile's frame": {"rope": "tile"},
    "bits": {"rank": None, "bits": 3.0},
    "bits, keys before RoPE": {"rank": None, "bits": 3.0, "rope": "before"},
    "bits, fitted again": {"rank": None, "bits": 3.0, "refresh": 1.0},
}


def tokens(count, seed=0, batch=1):
    """Keys before RoPE, and values, near a subspace that drifts."""
    torch.manual_seed(seed)
    wide = torch.randn(2, batch, HEADS, count, 5) @ torch.randn(2, 1, HEADS, 5, SIZE)
    return wide + torch.linspace(0, 1, count)[:, None] * torch.randn(2, batch, HEADS, count, SIZE)


def rotated(pair, start=0):
    keys, values = pair
    return torch.stack([ROTATION.turn(keys, start + torch.arange(keys.shape[2])), values])


def padded(pair, padding):
    """Behind padding that is larger than everything else."""
    return torch.cat([100 * torch.randn(2, 1, HEADS, padding, SIZE), pair], 3)


def mask_of(*padding, count):
    """A causal mask of the last tokens, as transformers makes it."""
    seen = torch.arange(count) >= torch.tensor(padding)[:, None]
    return seen[:, None, None] & torch.ones(count, count, dtype=torch.bool).tril()


def filled(pair, mask, kv, steps=(TOKENS,)):
    """The cache with a prompt, the rest in steps of four."""
    done, count = 0, pair.shape[3]
    bounds = [*steps, *range(steps[-1] + 4, count + 1, 4)]
    for stop in bounds:
        kv.append(*pair[:, :, :, done:stop])
        kv.hide(None if mask is None else mask[:, :, done:stop, :stop])
        kv.compress()
        done = stop
    return kv


def pair_of_caches(changes, float_mask=False, padding=PADDING):
    """The row alone, and behind padding; twenty tokens come after the prompt."""
    row = rotated(tokens(TOKENS + 20))
    mask = mask_of(padding, count=padding + TOKENS + 20)
    if float_mask:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    settings = lr.KVSettings(**{"rank": 4} | KEEP | changes)
    alone = filled(row, None, lr.LowRankKV(settings, ROTATION))
    behind = filled(padded(row, padding), mask, lr.LowRankKV(settings, ROTATION), (padding + TOKENS,))
    return alone, behind, mask


def padding_for(name):
    """A whole tile where keys are stored in their tile's frame: tiles are counted in the cache, not in the row."""
    return TILE_FRAME if "tile" in name or "bits" in name else PADDING


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_behind_padding_is_the_row_without(name, float_mask):
    alone, behind, mask = pair_of_caches(SETTINGS[name], float_mask, padding_for(name))
    padding = padding_for(name)
    assert len(behind) == len(alone) + padding
    assert behind.compressed == alone.compressed + padding > padding
    for ours, theirs in zip(behind.dense(), alone.dense(), strict=True):
        close(ours[:, :, padding:], theirs)
    query = torch.randn(1, 2 * HEADS, 5, SIZE)
    bound = 2e-4 + integer_bound_of_attention(alone, query)
    torch.testing.assert_close(behind.attend(query, mask=mask[:, :, -5:]), alone.attend(query), rtol=0, atol=bound)


@pytest.mark.parametrize("name", SETTINGS)
def test_its_subspaces_are_those_of_the_row(name):
    alone, behind, _ = pair_of_caches(SETTINGS[name], padding=padding_for(name))
    for ours, theirs in zip(behind.old, alone.old, strict=True):
        a, b = (each.parts[0].subspace for each in (ours, theirs))
        close(a.mean, b.mean)
        spans = [basis.float() @ torch.linalg.pinv(basis.float()) for basis in (a.basis, b.basis)]
        torch.testing.assert_close(*spans, rtol=0, atol=2e-2 if name == "int8" else 1e-3)


def test_without_the_mask_padding_takes_the_subspace():
    """What the tests above would not notice otherwise."""
    row = rotated(tokens(TOKENS))
    settings = lr.KVSettings(rank=4, **KEEP)
    alone = filled(row, None, lr.LowRankKV(settings, ROTATION))
    behind = filled(padded(row, PADDING), None, lr.LowRankKV(settings, ROTATION), (PADDING + TOKENS,))
    assert float((behind.dense()[1][:, :, PADDING:] - alone.dense()[1]).abs().max()) > 1


@pytest.mark.parametrize("steps", [(73,), (10, 73), (12, 14, 16, 73), (40, 73)], ids=str)
def test_rows_of_one_batch_are_independent(steps):
    rows = [rotated(tokens(60 + PADDING - padding, seed)) for seed, padding in enumerate((0, PADDING, 5))]
    settings = lr.KVSettings(rank=4, refresh=None, **KEEP)
    together = torch.cat([padded(row, 60 + PADDING - row.shape[3]) for row in rows], 1)
    mask = mask_of(0, PADDING, 5, count=73)
    kv = filled(together, mask, lr.LowRankKV(settings, ROTATION), steps)
    if steps[0] == 73:
        for k, row in enumerate(rows):
            alone = filled(row, None, lr.LowRankKV(settings, ROTATION), (row.shape[3],))
            for ours, theirs in zip(kv.dense(), alone.dense(), strict=True):
                close(ours[k : k + 1, :, 73 - row.shape[3] :], theirs)
    for k, row in enumerate(rows):  # a row's first tokens are exact whenever they come
        first = slice(73 - row.shape[3], 73 - row.shape[3] + KEEP["keep_first"])
        for side in (0, 1):
            close(kv.side(side)[k, :, first], together[side, k, :, first])


@pytest.mark.parametrize("left", [70, 50, 18, 15, 13, 9, 2])
def test_crop_keeps_what_is_left(left):
    _, behind, mask = pair_of_caches({})
    before = [side.clone() for side in behind.dense()]
    behind.crop(left)
    assert len(behind) == left
    for ours, theirs in zip(behind.dense(), before, strict=True):
        close(ours[:, :, PADDING:], theirs[:, :, PADDING:left])
    more = tokens(30, seed=5)
    behind.append(*more)
    query = torch.randn(1, HEADS, 30, SIZE)
    keys, values = (torch.cat([side[:, :, :left], new], 2) for side, new in zip(before, more, strict=True))
    mask = mask_of(PADDING, count=left + 30)[:, :, -30:]
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask)
    seen = mask.any(-1)[0, 0]
    close(behind.attend(query, mask=mask)[:, :, seen], expected[:, :, seen])
    behind.hide(mask)
    behind.compress()
    assert behind.padding.starts is None or behind.padding.starts.index.tolist() == [PADDING]
    assert behind.compressed > 0


def test_rows_selected_and_repeated_keep_their_padding():
    row = rotated(tokens(TOKENS))
    together = torch.cat([padded(row[:, :, :, 20:], 20), row], 1)
    kv = filled(together, mask_of(20, 0, count=TOKENS), lr.LowRankKV(rank=4, rotation=ROTATION, **KEEP))
    expected = [side.clone() for side in kv.dense()]
    kv.select(torch.tensor([1, 0, 0]))
    kv.repeat(2)
    for ours, theirs in zip(kv.dense(), expected, strict=True):
        close(ours, theirs[[1, 1, 0, 0, 0, 0]])
    query = torch.randn(6, HEADS, 1, SIZE)
    mask = mask_of(0, 0, 20, 20, 20, 20, count=TOKENS)[:, :, -1:]
    dense = torch.nn.functional.scaled_dot_product_attention(query, *kv.dense(), mask)
    close(kv.attend(query, mask=mask), dense)


def test_a_row_with_few_tokens_gets_the_subspace_of_all():
    """All rows lie in one subspace, which a row of ten tokens does not show by itself."""
    torch.manual_seed(0)
    pair = torch.randn(2, 3, HEADS, TOKENS + 40, 3) @ torch.randn(2, 1, 1, 3, SIZE)
    kv = lr.LowRankKV(rank=3, rotation=ROTATION, refresh=None, **KEEP | {"keep_first": 0})
    mask = mask_of(0, TOKENS - 10, 10, count=TOKENS + 40)
    # positions count from a row's first token
    starts = torch.tensor([0, TOKENS - 10, 10])[:, None, None]
    pair[0] = ROTATION.turn(pair[0], torch.arange(TOKENS + 40) - starts)
    filled(pair, mask, kv)
    for ours, theirs in zip(kv.dense(), pair, strict=True):
        close(ours[1, :, TOKENS - 10 :], theirs[1, :, TOKENS - 10 :])


def test_subspaces_from_calibration_hold_keys_at_positions_in_their_row():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(1, 1, HEADS * SIZE, 4))[0]
    subspace = Subspace(basis, torch.zeros(1, 1, HEADS * SIZE))
    joint = torch.randn(2, 1, TOKENS, 4) @ basis[0, 0].mT
    row = rotated(joint.unflatten(3, (HEADS, SIZE)).transpose(2, 3))
    kv = lr.LowRankKV(rank=2, rotation=ROTATION, subspaces=(subspace, subspace), refresh=None, **KEEP)
    filled(padded(row, PADDING), mask_of(PADDING, count=PADDING + TOKENS), kv, (PADDING + TOKENS,))
    for ours, theirs in zip(kv.dense(), row, strict=True):
        close(ours[:, :, PADDING:], theirs)


def test_a_budget_is_shared_without_the_padding():
    row = rotated(tokens(TOKENS))
    errors, behind = [], padded(row, PADDING)
    for pair, mask in ((row, None), (behind, mask_of(PADDING, count=PADDING + TOKENS)), (behind, None)):
        kv = lr.LowRankKV(rank=1, rotation=ROTATION, **KEEP)
        kv.append(*pair)
        kv.hide(mask)
        limit = 7_000 + 200 * (pair.shape[3] - TOKENS)
        lr.compress_together([kv], limit)
        assert kv.nbytes() <= limit
        errors.append(float((kv.side(1)[:, :, -TOKENS:] - row[1]).norm()))
    assert errors[1] < 1.2 * errors[0]
    assert errors[2] > 2 * errors[0]


def test_masks_say_which_tokens_are_seen():
    causal = mask_of(2, 0, count=5)
    expected = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    added = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf)
    for mask in (causal, added, added.clamp_min(torch.finfo(torch.float32).min), expected, expected.long()):
        assert torch.equal(seen_tokens(mask, 0, 5), expected)
        assert torch.equal(seen_tokens(mask, 1, 3), expected[:, 1:3])
    assert RowStarts.of_mask(expected[1:], 2) is None
    assert RowStarts.of_mask(expected, 2).index.tolist() == [2, 0]


def test_an_arranged_mask_and_placed_tokens_by_hand():
    starts = RowStarts.of(torch.tensor([3, 0]), 2)
    mask = torch.arange(14).view(2, 1, 1, 7) % 7 >= torch.tensor([3, 0])[:, None, None, None]
    assert starts.arranged(mask).long().tolist() == [[[[1, 1, 0, 0, 0, 1, 1]]], [[[1] * 7]]]
    stored = torch.tensor([[30, 40, 20, -1, -1, 50, 60], [0, 10, 20, 30, 40, 50, 60]]).view(2, 1, 7, 1)
    assert starts.placed(stored).flatten(1)[:, 3:].tolist() == [[30, 40, 50, 60]] * 2
    assert starts.taken(starts.placed(stored)).flatten(1).tolist() == [[30, 40], [0, 10]]
