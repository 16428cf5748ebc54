"""Measures of stability and consistency, against peers, enumeration and cases by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import average, cophenet
from scipy.spatial.distance import squareform

import lowrank_layers as lr


def random_cp(shape: tuple[int, ...], rank: int, seed: int) -> lr.CP:
    g = torch.Generator().manual_seed(seed)
    columns = [torch.randn(n, rank, generator=g, dtype=torch.float64) for n in shape]
    return lr.CP(torch.rand(rank, generator=g, dtype=torch.float64) + 0.5, tuple(c / c.norm(dim=0) for c in columns))


def test_the_consensus_counts_agreeing_starts():
    one, other = torch.tensor([[1.0, 1, 0], [0, 0, 1]]), torch.tensor([[0.0, 1, 1], [1, 0, 0]])
    fits = [lr.NMF(torch.ones(4, 2), h) for h in (one, one, one, other)]
    assert lr.consensus_matrix(fits).tolist() == [[1, 0.75, 0], [0.75, 1, 0.25], [0, 0.25, 1]]


def test_dispersion_by_hand():
    assert lr.dispersion(torch.eye(5)) == 1
    assert lr.dispersion(torch.full((4, 4), 0.5)) == 0
    assert lr.dispersion(torch.tensor([[1.0, 0.75], [0.75, 1.0]])) == 0.625


@pytest.mark.parametrize("seed", range(5))
def test_cophenetic_correlation_is_that_of_scipy(seed):
    g = torch.Generator().manual_seed(seed)
    consensus = torch.rand(17, 17, generator=g, dtype=torch.float64)
    consensus = ((consensus + consensus.mT) / 2).fill_diagonal_(1)
    distances = squareform((1 - consensus).numpy())
    expected = np.corrcoef(distances, cophenet(average(distances)))[0, 1]
    assert lr.cophenetic_correlation(consensus) == pytest.approx(expected, abs=1e-12)


def test_columns_of_one_cluster_agree():
    assert lr.cophenetic_correlation(torch.ones(4, 4)) == 1


def test_the_factor_match_score_is_that_of_the_best_pairing():
    """Close to one another, greedy pairing is the best of all pairings."""
    first = random_cp((6, 5, 4), 4, 0)
    moved = [f + 0.1 * torch.randn(f.shape, generator=torch.Generator().manual_seed(1)) for f in first.factors]
    order = [2, 0, 3, 1]
    second = lr.CP(1.1 * first.weights[order], tuple((f / f.norm(dim=0))[:, order] for f in moved))
    cosines = math.prod((a.mT @ b).abs() for a, b in zip(first.factors, second.factors, strict=True))
    larger = torch.maximum(first.weights[:, None], second.weights)
    pairs = cosines * (1 - (first.weights[:, None] - second.weights).abs() / larger)
    best = max(sum(float(pairs[k, p[k]]) for k in range(4)) / 4 for p in itertools.permutations(range(4)))
    assert lr.factor_match_score(first, second) == pytest.approx(best, abs=1e-12)
    assert lr.factor_match_score(first, first) == pytest.approx(1, abs=1e-12)


def test_the_factor_match_score_does_not_see_signs_or_scales():
    f = random_cp((6, 5, 4), 3, 0)
    flipped = lr.CP(f.weights, (-f.factors[0], -f.factors[1], f.factors[2]))
    assert lr.factor_match_score(f, flipped) == pytest.approx(1, abs=1e-12)
    w, h = torch.rand(6, 2), torch.rand(2, 5)
    spread = lr.NMF(w * torch.tensor([2.0, 0.5]), h / torch.tensor([[2.0], [0.5]]))
    assert lr.factor_match_score(lr.NMF(w, h), spread) == pytest.approx(1, abs=1e-6)


def test_factorizations_that_differ_in_shape_or_rank_are_refused():
    with pytest.raises(lr.LowRankError, match="at ranks 2 and 3, expected equal ones"):
        lr.factor_match_score(random_cp((4, 3), 2, 0), random_cp((4, 3), 3, 0))


@pytest.mark.parametrize("seed", range(3))
def test_core_consistency_is_that_of_the_least_squares_core(seed):
    """The core as the solution of one regression on the Kronecker product of the factors, in numpy."""
    found = random_cp((7, 6, 5), 3, seed)
    tensor = found.to_dense() + 0.1 * torch.randn(7, 6, 5, generator=torch.Generator().manual_seed(seed))
    a, b, c = (factor.numpy() for factor in found.balanced())
    core = np.linalg.lstsq(np.kron(np.kron(a, b), c), tensor.numpy().ravel(), rcond=None)[0].reshape(3, 3, 3)
    for k in range(3):
        core[k, k, k] -= 1
    assert lr.core_consistency(tensor, found) == pytest.approx(100 * (1 - (core**2).sum() / 3), rel=1e-9)


def test_core_consistency_refuses_another_shape():
    with pytest.raises(lr.LowRankError, match=r"core_consistency: got a tensor of shape \(3, 3\), expected \(4, 3\)"):
        lr.core_consistency(torch.ones(3, 3), random_cp((4, 3), 2, 0))
