"""The other caches that benchmarks compare: what they keep, what they round, and the bytes that are counted."""

import pytest
import torch

import lowrank_layers as lr
from benchmarks.kv_driver import OBSERVED
from benchmarks.kv_peers import GROUP, Float8, Kivi, Palu, Simulated, SnapKV, rounded

SHAPE = 1, 3, 200, 64
SIZE = SHAPE[1] * SHAPE[3]


def read_back(store, keys, values):
    """What is read of a prompt once it is compressed; the next token is taken off."""
    store.update(keys, values)
    more = torch.zeros(1, 3, 1, 64)
    return tuple(t[:, :, :-1] for t in store.update(more, more))


@pytest.fixture
def tokens():
    keys, values = torch.randn(2, *SHAPE).bfloat16().float()
    return keys, values


def test_exact_counts_two_bytes(tokens):
    store = Simulated()
    assert all(map(torch.equal, read_back(store, *tokens), tokens))
    assert store.nbytes() == 2 * 2 * (SHAPE[2] + 1) * SIZE


def test_float8_rounds_by_a_sixteenth(tokens):
    store = Float8()
    for held, x in zip(read_back(store, *tokens), tokens, strict=True):
        # 3 bits of mantissa; below the normal numbers, a step of 2^-9 in units of max / 448
        least = x.abs().amax(-1, keepdim=True) / 448 * 2**-9
        assert ((held - x).abs() <= torch.maximum(x.abs() / 16, least) * 1.01).all()
        assert not torch.equal(held, x)
    assert store.nbytes() == 2 * (SHAPE[2] + 1) * (SIZE + 2 * SHAPE[1])


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_rounds_to_half_a_step_of_its_groups(tokens, bits):
    store = Kivi(bits)
    keys, values = read_back(store, *tokens)
    # keys leave by whole groups of tokens
    old = [(SHAPE[2] - 32) // GROUP * GROUP, SHAPE[2] - 32]
    for side, (held, x) in enumerate(zip((keys, values), tokens, strict=True)):
        assert torch.equal(held[:, :, old[side] :], x[:, :, old[side] :])
        held, x = (t[:, :, : old[side]] for t in (held, x))
        if side == 0:
            held, x = held.mT, x.mT
        groups = x.unflatten(3, (-1, GROUP))
        step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        error = (held - x).unflatten(3, (-1, GROUP)).abs().amax(-1)
        assert (error <= 0.51 * step).all()
        assert (error >= 0.2 * step).float().mean() > 0.9
    old[1] += 1  # one more token came
    exact = [SHAPE[2] + 1 - n for n in old]
    assert store.nbytes() == sum(SIZE * (n * (bits + 1) + 16 * e) for n, e in zip(old, exact, strict=True)) / 8


def test_rounding_takes_every_level():
    found = rounded(torch.linspace(-1, 2, 1000)[None], 2)
    assert torch.allclose(found.unique(), torch.tensor([-1.0, 0.0, 1.0, 2.0]), atol=1e-3)


@pytest.mark.parametrize("bits", [None, 4])
def test_palu_projects_keys_before_rope(bits):
    rotation = lr.Rotation.of(SHAPE[3])
    bases = [torch.linalg.qr(torch.randn(SIZE, 40))[0] for _ in range(2)]
    plain = [
        (torch.randn(SHAPE[2], 40) @ basis.mT).unflatten(1, (3, 64)).transpose(0, 1)[None].contiguous()
        for basis in bases
    ]
    tokens = rotation.turn(plain[0], torch.arange(SHAPE[2])), plain[1]
    store = Palu((bases[0], bases[1]), rotation, bits)
    for held, x in zip(read_back(store, *tokens), tokens, strict=True):
        error = float((held - x).norm() / x.norm())
        assert error < 1e-3 if bits is None else 0.03 < error < 0.15
    each = 16 * 40 if bits is None else 4 * 40 + 2 * 32  # two groups
    assert store.nbytes() == 2 * (SHAPE[2] + 1) * each / 8


def test_snapkv_keeps_what_the_last_queries_look_at(tokens):
    keys, values = tokens
    sought = [20, 77, 140]
    queries = torch.randn(1, 9, OBSERVED, 64) * 0.01
    for head, at in enumerate(sought):
        keys[:, head, at] = 0
        keys[:, head, at, head] = 30.0
        queries[:, 3 * head : 3 * head + 3, :, head] = 30.0
    store = SnapKV(queries, OBSERVED + 7)
    assert store.update(keys, values)[0].shape[2] == SHAPE[2]
    assert store.kept is not None
    held = store.kept[0]
    assert held.shape[2] == OBSERVED + 7
    assert torch.equal(held[:, :, -OBSERVED:], keys[:, :, -OBSERVED:])
    for head, at in enumerate(sought):
        # pooling over 7 tokens keeps its neighbours
        assert torch.equal(held[:, head, :7], keys[:, head, at - 3 : at + 4])
