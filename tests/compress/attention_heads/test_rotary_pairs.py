"""Rotary pairs: scores in complex numbers, and the choice of bands against all choices there are."""

import itertools

import pytest
import torch
from torch import Tensor

from lowrank_layers.compress.attention_heads.entries import losses_of, maps_to
from lowrank_layers.compress.attention_heads.rotary_pairs import (
    choose_bands,
    detuning,
    energies,
    from_pairs,
    pair_moment,
    seen_means,
    to_pairs,
)

CONTEXT = 100


def rotated(x: Tensor, frequencies: Tensor, position: float) -> Tensor:
    """RoPE as its paper has it: each pair of entries times a rotation."""
    a, b = x.chunk(2)
    cos, sin = (frequencies * position).cos(), (frequencies * position).sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def moments(heads: int, p: int) -> Tensor:
    z = torch.randn(heads, 3 * p, p, dtype=torch.complex128) * torch.rand(p)
    return z.mT @ z.conj()


def test_scores_of_complex_pairs_are_those_of_rope():
    q, k, frequencies = torch.randn(8).double(), torch.randn(8).double(), torch.rand(4).double()
    score = rotated(q, frequencies, 5) @ rotated(k, frequencies, 12)
    a, b = (to_pairs(each[:, None])[:, 0] for each in (q, k))
    assert torch.allclose(score, (a.conj() * b * torch.exp(7j * frequencies)).sum().real)
    assert torch.equal(from_pairs(to_pairs(q[:, None])), q[:, None])


def test_moments_of_pairs():
    x = torch.randn(50, 8).double()
    pairs = to_pairs(x.mT)
    assert torch.allclose(pair_moment(x.mT @ x), pairs @ pairs.mH)


def test_maps_of_pairs_of_one_frequency_commute_with_their_rotation():
    """Before RoPE or after it: so the maps go into the projections, and the cache holds fewer pairs."""
    queries, keys = moments(2, 3)
    same = torch.tensor([0.3, 0.3, 0.3]).double()
    _, to_keys = maps_to(queries, keys, 2)
    k = torch.randn(6).double()
    before = from_pairs(to_keys @ to_pairs(k[:, None]))[:, 0]
    after = from_pairs(to_keys @ to_pairs(rotated(k, same, 9)[:, None]))[:, 0]
    assert torch.allclose(rotated(before, same[:2], 9), after)


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_bands_lose_least_of_all_that_there_are(keep):
    queries, keys = moments(3, 5), moments(3, 5)
    frequencies = torch.tensor([1.0, 0.3, 0.02, 0.015, 0.001]).double()
    weights = energies(queries, keys)

    def loss(start: int, stop: int, rank: int) -> float:
        pairs = slice(start, stop)
        lost = float(losses_of(queries[:, pairs, pairs], keys[:, pairs, pairs]).sum(0)[rank])
        return lost + (detuning(frequencies[pairs], weights[pairs], CONTEXT) if rank else 0.0)

    prices = []
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, 5), n) for n in range(5)):
        parts = list(itertools.pairwise([0, *cuts, 5]))
        for ranks in itertools.product(*(range(stop - start + 1) for start, stop in parts)):
            if sum(ranks) == keep:
                prices.append(sum(loss(*part, rank) for part, rank in zip(parts, ranks, strict=True)))
    bands = choose_bands(queries, keys, frequencies, keep, CONTEXT)
    assert [bands[0].start, *(band.stop for band in bands)] == sorted({0, 5, *(band.start for band in bands)})
    assert sum(band.rank for band in bands) == keep
    assert sum(loss(band.start, band.stop, band.rank) for band in bands) == pytest.approx(min(prices))


def test_pairs_of_very_different_frequencies_are_chosen_by_their_norms():
    """MoDeGPT's choice: the pairs of greatest ``E |q_i|^2 E |k_i|^2`` stay, all others go."""
    scale = torch.tensor([1.0, 30.0, 3.0, 20.0, 2.0, 40.0]).double().sqrt()
    queries, keys = torch.diag(scale).cdouble()[None], torch.diag(scale).cdouble()[None]
    bands = choose_bands(queries, keys, torch.tensor([3.0, 1.5, 0.9, 0.4, 0.2, 0.09]).double(), 3, 1000)
    assert [pair for band in bands for pair in range(band.start, band.stop) if band.rank] == [1, 3, 5]


def test_means_are_seen_where_pairs_turn():
    seen = seen_means(torch.tensor([0.0, 1e-6, 1.0]).double(), 1000)
    assert seen[0] == 0
    assert 0 <= seen[1] < 1e-5
    assert seen[2] > 0.9
