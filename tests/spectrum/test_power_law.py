"""The power-law fit finds what an exhaustive search with weightwatcher's formulas finds."""

import numpy as np
import pytest
import torch

import lowrank_layers as lr


def searched(eigenvalues):
    """The best fit over all tails, each written out."""
    x = np.sort(eigenvalues[eigenvalues > 1e-5])
    short = len(x) < 20
    best = None
    for i in range(len(x) - 1):
        tail = x[i:]
        if short and len(tail) < 8:
            continue
        n = len(tail)
        alpha = 1 + (n - short) / np.log(tail / x[i]).sum()
        fitted = 1 - (tail / x[i]) ** (1 - alpha)
        distance = np.abs(fitted - np.arange(n) / n).max()
        if best is None or distance < best[0]:
            best = (distance, alpha, x[i], n)
    return best


@pytest.mark.parametrize("shape", [(10, 30), (12, 12), (19, 40), (20, 50), (60, 90), (128, 100)])
@pytest.mark.parametrize("heavy", [False, True])
def test_exhaustive_search(shape, heavy):
    weight = torch.randn(shape, dtype=torch.float64)
    if heavy:
        weight *= torch.rand(shape, dtype=torch.float64) ** -0.8
    eigenvalues = torch.linalg.svdvals(weight).square()
    fit = lr.fit_power_law(eigenvalues)
    found = (fit.distance, fit.alpha, fit.xmin, fit.tail)
    assert found == pytest.approx(searched(eigenvalues.numpy()), rel=1e-9)


# weightwatcher 0.7.7: WWFit(data).alpha, .xmin and .D, with data = eigenvalues_like_a_weight(count). The package
# powerlaw gives the same from 20 values on.
WEIGHTWATCHER = [
    (12, (1.9723069754312332, 0.3470252417789819, 0.07736709846436052)),
    (19, (1.9195575923112569, 0.3080901060555639, 0.06773464626314452)),
    (20, (2.1135841217525035, 0.39765975235223916, 0.11720673064139264)),
    (60, (2.462048604972187, 0.543363868015892, 0.08702586213312835)),
    (300, (2.2120884047589193, 0.3742343231019831, 0.09984297554960297)),
]


@pytest.mark.parametrize(("count", "expected"), WEIGHTWATCHER)
def test_weightwatcher(count, expected):
    fit = lr.fit_power_law(eigenvalues_like_a_weight(count))
    assert (fit.alpha, fit.xmin, fit.distance) == pytest.approx(expected, rel=1e-5)


def eigenvalues_like_a_weight(count):
    """A bulk and a heavy tail, without random numbers: the same on every machine."""
    k = torch.arange(1, count + 1, dtype=torch.float64)
    return (1 + torch.sin(k) / 2) * k.flip(0) / count + (k / count) ** 40 * 20 / (1.2 + torch.cos(3 * k))


def test_order_does_not_matter():
    eigenvalues = eigenvalues_like_a_weight(50)
    assert lr.fit_power_law(eigenvalues) == lr.fit_power_law(eigenvalues.flip(0))


def test_too_few_or_equal_eigenvalues_have_no_fit():
    assert lr.fit_power_law(torch.arange(1.0, 8.0)) is None
    assert lr.fit_power_law(torch.ones(30)) is None
    assert lr.fit_power_law(torch.full((30,), 1e-6)) is None


def test_not_finite():
    with pytest.raises(lr.LowRankError, match="NaN or Inf"):
        lr.fit_power_law(torch.tensor([1.0, float("nan")]))
