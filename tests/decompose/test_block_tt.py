"""TT-SVD of a matrix in digits, with rows that are free to take any value."""

import itertools
import math

import pytest
import torch

from lowrank_layers.decompose.block_tt import balanced_cores, block_trains
from lowrank_layers.decompose.bonds import clamp_bonds, train_size, uniform_bonds
from lowrank_layers.decompose.digits import split_digits
from lowrank_layers.linalg import train_product

from ..contracts.tables import generator, relative


def low_tt_rank(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    """A matrix that is a train of that rank exactly, in the digits that a layer picks."""
    split = split_digits(rows, columns, 3, "test")
    bonds = [1, rank, rank, 1]
    cores = [
        torch.randn(bonds[k], n, d, bonds[k + 1], generator=generator(seed + k), dtype=torch.float64)
        for k, (n, d) in enumerate(zip(*split, strict=True))
    ]
    return train_product(cores)[:rows]


def unfoldings(weight: torch.Tensor, split) -> list[torch.Tensor]:
    """The matrix, filled up with zeros, with the first k digits as rows, by index arithmetic alone."""
    (n, d), order = split, len(split[0])
    filled = torch.zeros(math.prod(n), weight.shape[1], dtype=weight.dtype)
    filled[: len(weight)] = weight
    tensor = torch.empty(*itertools.chain.from_iterable(zip(n, d, strict=True)), dtype=weight.dtype)
    for place in itertools.product(*(range(size) for size in tensor.shape)):
        i, j = 0, 0
        for k in range(order):
            i, j = i * n[k] + place[2 * k], j * d[k] + place[2 * k + 1]
        tensor[place] = filled[i, j]
    sizes = [a * b for a, b in zip(n, d, strict=True)]
    return [tensor.reshape(math.prod(sizes[:k]), -1) for k in range(1, order)]


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_the_error_is_within_the_bound_of_tt_svd(order, rank):
    weight = torch.randn(16, 16, generator=generator(1), dtype=torch.float64) if order != 3 else None
    weight = torch.randn(27, 8, generator=generator(1), dtype=torch.float64) if weight is None else weight
    split = split_digits(*weight.shape, order, "test")
    assert math.prod(split[0]) == len(weight)  # no rows filled up, whose error would not be seen
    bonds = clamp_bonds((rank,) * (order - 1), split)
    (cores,) = block_trains(weight, split, [bonds])
    assert tuple(core.shape[3] for core in cores[:-1]) == bonds
    tails = [
        float(torch.linalg.svdvals(matrix)[bond:].square().sum())
        for matrix, bond in zip(unfoldings(weight, split), bonds, strict=True)
    ]
    error = float((train_product(cores) - weight).square().sum())
    assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9)
    if order == 2:
        assert error == pytest.approx(tails[0], rel=1e-9)


@pytest.mark.parametrize("padding_idx", [None, 0, 40])
@pytest.mark.parametrize(("rows", "columns"), [(256, 16), (100, 12), (301, 24), (40, 30)])
@pytest.mark.parametrize("rank", [1, 3, 8, 13])
@pytest.mark.parametrize("noise", [0.2, 10])
def test_free_rows_never_make_it_worse(rows, columns, rank, noise, padding_idx):
    weight = low_tt_rank(rows, columns, rank)
    weight = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator(9), dtype=torch.float64)
    if padding_idx is not None:
        padding_idx = min(padding_idx, rows - 1)
        weight[padding_idx] = 0
    split = split_digits(rows, columns, 3, "test")
    bonds = clamp_bonds((rank, rank), split)
    filled = torch.zeros(math.prod(split[0]), columns, dtype=torch.float64)
    filled[:rows] = weight
    (free,) = block_trains(weight, split, [bonds], free_row=padding_idx)
    (with_zeros,) = block_trains(filled, split, [bonds])

    def error(cores):
        product = train_product(cores)[:rows]
        if padding_idx is not None:
            product[padding_idx] = 0
        return relative(product, weight)

    assert error(free) <= error(with_zeros) * (1 + 1e-9) + 1e-14


def test_scales_weight_the_error_and_are_divided_out_again():
    """An entry whose weight is large is nearly exact, and at full rank the train is the matrix itself."""
    split = (4, 4), (2, 3)
    matrix = torch.randn(16, 6, generator=generator(3), dtype=torch.float64)
    scales = [torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)]
    scales[0][1, 0], scales[1][2, 1] = 1e4, 1e4
    full, small = block_trains(matrix, split, [(8,), (2,)], scales=scales)
    assert relative(train_product(full), matrix) < 1e-10
    error = (train_product(small) - matrix).abs()
    assert float(error[1 * 4 + 2, 0 * 3 + 1]) < 1e-6 * float(error.max())
    (plain,) = block_trains(matrix, split, [(2,)])
    assert relative(train_product(plain), matrix) < relative(train_product(small), matrix)


def test_balanced_cores_are_the_same_train_with_equal_norms():
    cores = [
        torch.randn(*shape, generator=generator(4)) * 1e3**k for k, shape in enumerate([(1, 3, 2, 2), (2, 3, 2, 1)])
    ]
    balanced = balanced_cores(cores)
    assert relative(train_product(balanced), train_product([core.double() for core in cores])) < 1e-12
    assert float(balanced[0].norm()) == pytest.approx(float(balanced[1].norm()))
    zero = balanced_cores([torch.zeros(1, 2, 2, 1), torch.ones(1, 2, 2, 1)])
    assert not any(bool(core.any()) for core in zero)


def test_uniform_bonds_end_where_no_bond_grows():
    split = split_digits(27, 8, 3, "test")
    ladder = uniform_bonds(split)
    assert ladder[0] == (1, 1)
    assert ladder[-1] == (6, 6)
    assert [train_size(bonds, split) for bonds in ladder] == sorted({train_size(bonds, split) for bonds in ladder})
    assert train_size((2, 3), split) == 6 * 2 + 2 * 6 * 3 + 3 * 6
