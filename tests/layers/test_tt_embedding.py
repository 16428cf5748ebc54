"""What is particular to the block tensor train, beyond what every layer promises."""

import pytest
import tensorly
import torch
from tensorly.tt_matrix import tt_matrix_to_matrix
from torch import nn

import lowrank_layers as lr
from lowrank_layers.calibrate.moments import Moments
from lowrank_layers.calibrate.statistics import LayerStats
from lowrank_layers.linalg import rounded_train

from ..contracts.tables import generator, relative
from ..decompose.test_block_tt import low_tt_rank, unfoldings


def embedding_of(weight: torch.Tensor, **settings) -> nn.Embedding:
    return nn.Embedding.from_pretrained(weight, freeze=False, **settings)


# ------------------------------------------------------------------------------------------------------- digits


def test_the_split_of_known_sizes():
    layer = lr.TensorizedEmbedding(50_000, 768, rank=2, device="meta")
    assert layer.split == ((37, 37, 37), (8, 8, 12))
    assert lr.TensorizedEmbedding(101, 13, rank=2).split == ((5, 5, 5), (1, 1, 13))
    assert lr.TensorizedEmbedding(101, 13, rank=2, order=2).split == ((11, 10), (1, 13))


def test_a_split_of_ones_own_is_kept_there_and_back():
    layer = lr.TensorizedEmbedding(10, 6, rank=3, split=((2, 5), (3, 2)))
    assert layer.form == {"split": [[2, 5], [3, 2]]}
    again = lr.TensorizedEmbedding.like(layer.to_dense(), rank=layer.rank, **layer.form)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    assert lr.TensorizedEmbedding(10, 6, rank=3, order=2).form == {"order": 2}


@pytest.mark.parametrize("split", [((2, 5),), ((2, 4), (3, 2)), ((2, 5), (3, 3)), ((10,), (6,)), 7, (("a",), ("b",))])
def test_splits_that_do_not_fit_are_refused(split):
    with pytest.raises(lr.LowRankError, match=r"split.*10 .*6"):
        lr.TensorizedEmbedding(10, 6, rank=2, split=split)


@pytest.mark.parametrize("order", [1, 0, True, 2.0])
def test_bad_orders_are_refused(order):
    with pytest.raises(lr.LowRankError, match="order"):
        lr.TensorizedEmbedding(10, 6, rank=2, order=order)


@pytest.mark.parametrize("rank", [(2,), (2, 2, 2), (2, 0), (2, lr.ParameterFraction(0.5)), (True, 2)])
def test_bonds_that_do_not_fit_are_refused(rank):
    with pytest.raises(lr.LowRankError, match=r"TensorizedEmbedding.*rank"):
        lr.TensorizedEmbedding(10, 6, rank=rank)


# --------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("shape", [(16, 16), (17, 13), (23, 1), (1, 12), (30, 7)], ids=str)
def test_full_rank_is_exact_in_fp64(shape, order):
    weight = torch.randn(*shape, generator=generator(0), dtype=torch.float64)
    layer = lr.TensorizedEmbedding.from_dense(embedding_of(weight), rank=10_000, order=order)
    assert relative(layer(torch.arange(len(weight))), weight) < 1e-12
    assert relative(layer.factors().to_dense(), weight) < 1e-12


def test_a_train_is_recovered_at_its_rank():
    weight = low_tt_rank(100, 12, rank=3)
    assert torch.linalg.matrix_rank(weight) == 12
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = lr.TensorizedEmbedding.from_dense(embedding_of(weight.to(dtype)), rank=3)
        assert relative(layer.weight, weight) < limit


@pytest.mark.parametrize("padding_idx", [None, 0, 13, -1])
@pytest.mark.parametrize(
    ("rows", "columns", "settings"),
    [
        (256, 16, {"rank": 8}),
        (27, 8, {"rank": 2}),
        (301, 24, {"rank": 9}),
        (730, 32, {"rank": 10}),
        (500, 27, {"rank": 4, "order": 4}),
        (90, 12, {"rank": 5, "order": 2}),
        (1030, 8, {"rank": (3, 6), "split": [(11, 10, 10), (2, 2, 2)]}),
        (77, 16, {"rank": 3, "split": [(40, 4, 4), (4, 2, 2)]}),
    ],
)
def test_from_dense_of_its_dense_form_is_the_layer(rows, columns, settings, padding_idx):
    """Rows that only fill the digits up, and the padding row, are not zero in the train."""
    torch.manual_seed(0)
    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        layer = lr.TensorizedEmbedding(rows, columns, padding_idx, dtype=dtype, **settings)
        again = lr.TensorizedEmbedding.from_dense(layer.to_dense(), **settings)
        assert again.rank == layer.rank
        assert relative(again.weight, layer.weight) < limit


def test_the_value_is_tensorlys_tt_matrix():
    factors = lr.TensorizedEmbedding(24, 12, rank=3, dtype=torch.float64).factors()
    tensorly.set_backend("pytorch")
    assert relative(factors.to_dense(), tt_matrix_to_matrix(list(factors.cores))[:24]) < 1e-12


def test_rounding_finds_the_smaller_train_and_bounds_the_error():
    layer = lr.TensorizedEmbedding(27, 8, rank=2, dtype=torch.float64)
    cores = [core.detach() for core in layer.cores()]
    wide = [torch.cat([cores[0], cores[0]], -1), *cores[1:]]
    wide[1] = torch.cat([cores[1], -0.5 * cores[1]], 0)
    f = lr.BlockTT(tuple(wide), 27)
    assert f.rank == (4, 2)
    assert f.truncate((2, 2)).relative_error(f.to_dense()) < 1e-12
    full = lr.TensorizedEmbedding.from_dense(nn.Embedding(27, 8, dtype=torch.float64), rank=100).factors()
    small = full.truncate((3, 2))
    tails = [
        float(torch.linalg.svdvals(m)[r:].square().sum())
        for m, r in zip(unfoldings(full.to_dense(), ((3, 3, 3), (2, 2, 2))), (3, 2), strict=True)
    ]
    assert small.rank == (3, 2)
    assert float((small.to_dense() - full.to_dense()).square().sum()) <= sum(tails) * (1 + 1e-9)
    flat = [core.flatten(1, 2) for core in full.cores]
    assert [tuple(core.shape) for core in rounded_train(flat, (3, 2))] == [(1, 6, 3), (3, 6, 2), (2, 6, 1)]
    for bad in ((3,), (3, 0)):
        with pytest.raises(lr.LowRankError, match="truncate"):
            full.truncate(bad)


# ------------------------------------------------------------------------------------------------------- padding


def test_the_padding_vector_is_zero_and_passes_no_gradient():
    embedding = nn.Embedding(20, 6, padding_idx=4)
    for layer in (
        lr.TensorizedEmbedding.from_dense(embedding, rank=2),
        lr.TensorizedEmbedding(20, 6, padding_idx=-16, rank=2),
    ):
        assert layer.padding_idx == 4
        layer(torch.tensor([4, 4])).sum().backward()
        assert all(not bool(p.grad.any()) for p in layer.parameters())
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(torch.arange(20)).square().sum().backward()
        optimizer.step()
        assert not bool(layer(torch.tensor(4)).any())
        assert not bool(layer.to_dense().weight[4].any())
        assert not bool(layer.weight[4].any())
        assert bool(layer(torch.tensor(5)).all())


def test_a_padding_row_that_is_not_zero_is_refused():
    embedding = nn.Embedding(20, 6, padding_idx=4)
    nn.init.normal_(embedding.weight)
    with pytest.raises(lr.UnsupportedLayerError, match=r"row 4, the padding.*Zero that row"):
        lr.TensorizedEmbedding.from_dense(embedding, rank=2)
    assert not lr.TensorizedMethod().matches(lr.Candidate(embedding))
    with pytest.raises(lr.LowRankError, match="padding_idx 20"):
        lr.TensorizedEmbedding(20, 6, padding_idx=20, rank=2)


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_what_cores_cannot_do_is_refused_with_the_reason(setting):
    (name,) = setting
    for make in (
        lambda: lr.TensorizedEmbedding(20, 6, rank=2, **setting),
        lambda: lr.TensorizedEmbedding.from_dense(nn.Embedding(20, 6, **setting), rank=2),
    ):
        with pytest.raises(lr.UnsupportedLayerError, match=rf"TensorizedEmbedding.*{name}=.*LowRankEmbedding"):
            make()
    assert not lr.TensorizedMethod().matches(lr.Candidate(nn.Embedding(20, 6, **setting)))


@pytest.mark.parametrize("index", [-1, 20, 23, 27, 500])
def test_an_index_out_of_range_is_refused_though_the_digits_could_count_it(index):
    layer = lr.TensorizedEmbedding(20, 6, rank=2)
    with pytest.raises(IndexError):
        layer(torch.tensor([index]))


def test_indices_of_any_shape_and_integer_type():
    layer = lr.TensorizedEmbedding(20, 6, rank=2)
    weight = layer.weight
    assert torch.allclose(layer(torch.tensor(7)), weight[7], atol=1e-6)
    assert layer(torch.empty(0, dtype=torch.long)).shape == (0, 6)
    assert torch.allclose(
        layer(torch.arange(20, dtype=torch.int32).reshape(2, 5, 2)), weight.reshape(2, 5, 2, 6), atol=1e-6
    )


# ---------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(("kind", "expected"), [("train", "tensorized"), ("pair", "svd")])
def test_a_plan_takes_the_form_that_the_embedding_has(kind, expected):
    rows, columns = 20_000, 32
    if kind == "train":
        weight = low_tt_rank(rows, columns, rank=3).float()
        assert torch.linalg.matrix_rank(weight) == columns
    else:
        weight = torch.randn(rows, 2, generator=generator(0)) @ torch.randn(2, columns, generator=generator(1))
    model = nn.Sequential(embedding_of(weight / weight.std()), nn.Linear(columns, 4))
    plan = lr.make_plan(model, lr.Budget(params=0.1))
    assert plan["0"].method == expected
    assert plan["0"].error < 1e-3
    small = lr.factorize_(model, plan)
    assert relative(small[0].to_dense().weight, weight / weight.std()) < 1e-3
    assert sum(p.numel() for p in small.parameters()) <= plan.total.params * 0.1


def test_a_plan_with_trains_is_saved_loaded_and_closed_again(tmp_path):
    model = nn.Sequential(embedding_of(low_tt_rank(12_000, 8, rank=2).float(), padding_idx=None), nn.Linear(8, 4))
    x = torch.randint(12_000, (5, 3))
    expected = model(x)
    plan = lr.make_plan(model, lr.Budget(params=0.05))
    assert plan["0"].method == "tensorized"
    plan.save(tmp_path / "plan.json")
    lr.factorize_(model, lr.Plan.load(tmp_path / "plan.json"))
    assert lr.Plan.from_model(model)["0"].rank == plan["0"].rank
    lr.save(model, tmp_path / "model.safetensors")
    other = lr.load(tmp_path / "model.safetensors", nn.Sequential(nn.Embedding(12_000, 8), nn.Linear(8, 4)))
    assert torch.equal(other(x), model(x))
    assert relative(model(x), expected) < 1e-4
    assert type(lr.densify_(model)[0]) is nn.Embedding


def test_small_embeddings_get_no_options():
    assert lr.TensorizedMethod().options(lr.Candidate(nn.Embedding(500, 16))) == []
    assert lr.TensorizedMethod(min_rows=500).options(lr.Candidate(nn.Embedding(500, 16)))


def test_frequencies_lower_the_weighted_error():
    """Words sorted by frequency, as vocabularies are: marginals over the digits see most of Zipf's law."""
    rows, columns = 1000, 16
    embedding = nn.Embedding(rows, columns)
    frequency = 1 / (torch.arange(rows, dtype=torch.float64) + 3)
    frequency /= frequency.sum()
    stats = LayerStats(Moments(frequency.clone(), frequency.clone(), 10**6), input_shape=(7,), positions=7.0)
    method = lr.TensorizedMethod(min_rows=500)
    for option in method.options(lr.Candidate(embedding, stats)):
        weighted, plain = (method.build(lr.Candidate(embedding, known), option.rank) for known in (stats, None))

        def lost(layer):
            error = (layer.weight - embedding.weight).double().square().sum(1)
            return float((error @ frequency).detach())

        assert lost(weighted) < lost(plain)
