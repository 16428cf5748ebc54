"""The choice of one option per layer whose largest error is least under a budget."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BudgetError


def allocate_least_worst(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Picks one option per layer so that the largest error is least and the total cost at most ``capacity``.

    One threshold holds for all layers: each takes its cheapest option with an error of at most the threshold, and the
    least threshold that fits is found by bisection over the errors that occur. The choice is exact.

    Args:
        costs: for each layer, the cost of each option.
        errors: for each layer, the error of each option, on one scale for all layers.
        capacity: the limit on the sum of costs.

    Returns:
        The index of the chosen option of each layer.

    Raises:
        BudgetError: if even the cheapest options exceed the capacity.

    Examples:
        >>> allocate_least_worst([[1, 5, 9], [2, 6, 9]], [[0.3, 0.1, 0.0], [0.2, 0.1, 0.0]], capacity=7)
        [1, 0]
    """
    options = [sorted(zip(c, e, range(len(c)), strict=True)) for c, e in zip(costs, errors, strict=True)]
    least = sum(layer[0][0] for layer in options)
    if least > capacity:
        raise BudgetError(f"the smallest options cost {least:,} together, but only {capacity:,} are left for them.")
    if not options:
        return []
    # below this threshold some layer has no option at all
    lowest = max(min(error for _, error, _ in layer) for layer in options)
    thresholds = sorted({error for layer in options for _, error, _ in layer if error >= lowest})
    below, fits = -1, len(thresholds) - 1
    while fits - below > 1:
        middle = (below + fits) // 2
        picks = _cheapest(options, thresholds[middle])
        below, fits = (below, middle) if sum(cost for cost, _, _ in picks) <= capacity else (middle, fits)
    return [index for _, _, index in _cheapest(options, thresholds[fits])]


def _cheapest(options: Sequence[Sequence[tuple[int, float, int]]], threshold: float) -> list[tuple[int, float, int]]:
    """Each layer's cheapest option within the threshold; options are sorted by cost, then by error."""
    return [next(option for option in layer if option[1] <= threshold) for layer in options]
