import statistics

import pytest
import torch

import lowrank_layers as lr
from lowrank_layers import plot


def test_error_and_compression_against_rank():
    matrix = torch.rand(10, 8)
    fits = [lr.svd(matrix, rank) for rank in (4, 1, 2)]
    left, right = plot.error_against_rank(matrix, {"SVD": fits}).axes
    values = torch.linalg.svdvals(matrix)
    tails = [float(values[rank:].norm() / values.norm()) for rank in (1, 2, 4)]
    assert list(left.get_lines()[0].get_xdata()) == [1, 2, 4]
    assert left.get_lines()[0].get_ydata() == pytest.approx(tails, rel=1e-4)
    assert right.get_lines()[0].get_ydata() == pytest.approx([80 / (19 * rank) for rank in (1, 2, 4)])
    assert list(right.get_lines()[1].get_ydata()) == [1, 1]


def test_a_tucker_decomposition_stands_at_its_largest_rank():
    tensor = torch.rand(4, 3, 2)
    figure = plot.error_against_rank(tensor, {"Tucker": [lr.tucker(tensor, (3, 2, 1))], "CP": [lr.cp(tensor, 2)]})
    assert [list(line.get_xdata()) for line in figure.axes[0].get_lines()] == [[3], [2]]
    with pytest.raises(lr.LowRankError, match="no factorizations"):
        plot.error_against_rank(tensor, {"CP": []})


def test_stability_of_nmf_is_measured_in_three_ways():
    matrix = torch.rand(12, 3) @ torch.eye(3).repeat(1, 4) + 0.1
    fits = {rank: [lr.nmf(matrix, rank, init="random", seed=seed) for seed in range(3)] for rank in (3, 2)}
    axes = plot.stability_against_rank(matrix, fits).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert all(list(line.get_xdata()) == [2, 3] for line in lines.values())
    consensus = [lr.consensus_matrix(fits[rank]) for rank in (2, 3)]
    assert list(lines["dispersion"].get_ydata()) == [lr.dispersion(each) for each in consensus]
    assert list(lines["cophenetic correlation"].get_ydata()) == [lr.cophenetic_correlation(each) for each in consensus]
    best, *others = sorted(fits[2], key=lambda fit: fit.relative_error(matrix))
    expected = statistics.median(lr.factor_match_score(best, each) for each in others)
    assert lines["factor match score"].get_ydata()[0] == expected


def test_stability_of_cp_is_its_factor_match():
    tensor = torch.einsum("ir,jr,kr->ijk", torch.randn(6, 2), torch.randn(5, 2), torch.randn(4, 2))
    fits = {2: [lr.cp(tensor, 2, init="random", seed=seed) for seed in range(3)]}
    (line,) = plot.stability_against_rank(tensor, fits).axes[0].get_lines()
    assert line.get_label() == "factor match score"
    assert line.get_ydata()[0] > 0.95
    for bad in ({}, {2: fits[2][:1]}):
        with pytest.raises(lr.LowRankError, match="at least two starts"):
            plot.stability_against_rank(tensor, bad)
