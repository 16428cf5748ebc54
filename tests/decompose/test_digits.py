"""Digits of rows and columns: mixed radix by definition."""

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

import lowrank_layers as lr
from lowrank_layers.decompose.digits import check_split, split_digits, tensorize

from ..contracts.tables import DERANDOMIZED


@DERANDOMIZED
@given(st.integers(1, 5000), st.integers(1, 600), st.integers(2, 4))
def test_digits_cover_the_rows_and_multiply_to_the_columns(rows, columns, order):
    n, d = split_digits(rows, columns, order, "test")
    assert len(n) == len(d) == order
    assert math.prod(d) == columns
    assert math.prod(n) >= rows
    assert max(n) - min(n) <= 1
    if max(n) > 1:
        smaller = sorted(n)
        smaller[-1] -= 1
        assert math.prod(smaller) < rows  # one less would not do


@pytest.mark.parametrize(
    ("rows", "columns", "order", "expected"),
    [
        (50_000, 768, 3, ((37, 37, 37), (8, 8, 12))),
        (101, 13, 3, ((5, 5, 5), (1, 1, 13))),
        (101, 13, 2, ((11, 10), (1, 13))),
        (1, 1, 2, ((1, 1), (1, 1))),
    ],
)
def test_digits_of_known_sizes(rows, columns, order, expected):
    assert split_digits(rows, columns, order, "test") == expected


@pytest.mark.parametrize("order", [1, 0, True, 2.0])
def test_bad_orders_are_refused(order):
    with pytest.raises(lr.LowRankError, match=rf"^test: got order={order}, expected an integer of at least 2"):
        split_digits(10, 6, order, "test")


@pytest.mark.parametrize("split", [((2, 5),), ((2, 4), (3, 2)), ((2, 5), (3, 3)), ((10,), (6,)), 7, (("a",), ("b",))])
def test_splits_that_do_not_fit_are_refused(split):
    with pytest.raises(lr.LowRankError, match=r"^test: got split .*at least 10 .*exactly 6"):
        check_split(split, 10, 6, "test")


def test_a_split_that_fits_is_returned_as_tuples():
    assert check_split([[2, 6], [3, 2]], 10, 6, "test") == ((2, 6), (3, 2))


def test_an_entry_of_the_tensor_is_the_one_that_its_digits_count():
    n, d = (2, 3, 2), (3, 1, 2)
    matrix = torch.arange(1.0, 11 * 6 + 1).reshape(11, 6)
    tensor = tensorize(matrix, (n, d))
    assert tensor.shape == (6, 3, 4)
    for place in itertools.product(*(range(size) for pair in zip(n, d, strict=True) for size in pair)):
        i, j = place[::2], place[1::2]
        row, column = (i[0] * 3 + i[1]) * 2 + i[2], (j[0] * 1 + j[1]) * 2 + j[2]
        entry = tensor[tuple(a * size + b for a, b, size in zip(i, j, d, strict=True))]
        assert entry == (matrix[row, column] if row < 11 else 0)
