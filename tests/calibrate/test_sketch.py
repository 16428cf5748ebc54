"""Moments of wide gradients as diagonal plus low rank: exact where they can be, and linear in the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.calibrate import sketch
from lowrank_layers.calibrate.sketch import GradientSketch, diagonal_plus_low_rank
from lowrank_layers.compress.candidates import Candidate
from lowrank_layers.compress.regression import Metric


def sketched(rows: Tensor, parts: int = 1) -> GradientSketch:
    found = GradientSketch(rows.shape[1], torch.device("cpu"), torch.float64)
    for part in rows.chunk(parts):
        found.update(part)
    return found


@pytest.mark.parametrize("rank", [1, 40, sketch.COLUMNS - 10])
def test_a_moment_of_low_rank_is_found_exactly(rank):
    rows = (torch.randn(1000, rank) @ torch.randn(rank, 600)).double()
    moment = rows.mT @ rows / len(rows)
    diagonal, factor = diagonal_plus_low_rank(sketched(rows, parts=7).second)
    assert torch.dist(torch.diag(diagonal) + factor @ factor.mT, moment) < 1e-6 * moment.norm()


def test_the_diagonal_is_exact_and_the_rest_never_larger_than_the_moment():
    scales = torch.logspace(0, -3, 600, dtype=torch.double)
    rows = (torch.randn(2000, 600, dtype=torch.double) * scales) @ torch.linalg.qr(torch.randn(600, 600).double()).Q
    moment = rows.mT @ rows / len(rows)
    diagonal, factor = diagonal_plus_low_rank(sketched(rows).second)
    torch.testing.assert_close(diagonal + factor.square().sum(1), moment.diagonal())
    least = torch.linalg.eigvalsh(moment - factor @ factor.mT)[0]
    assert least > -1e-6 * torch.linalg.matrix_norm(moment, 2)
    apart = torch.dist(torch.diag(diagonal) + factor @ factor.mT, moment) / moment.norm()
    assert apart < 0.05
    assert apart < 0.5 * torch.dist(torch.diag(moment.diagonal()), moment) / moment.norm()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_tiny_and_huge_gradients_neither_vanish_nor_overflow(size):
    rows = torch.randn(50, 600)
    want, got = sketched(rows).second, sketched((rows * size).float()).second
    torch.testing.assert_close(got / size**2, want, rtol=1e-4, atol=1e-4)


class Wide(nn.Module):
    """A layer with many outputs, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(24, 530), nn.Linear(530, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).tanh())


def batches() -> list[Tensor]:
    return list(torch.randn(64, 24, generator=torch.Generator().manual_seed(3)).split(16))


@pytest.mark.parametrize("staged", [False, True])
def test_calibration_sketches_wide_layers_only_and_plans_with_them(staged, tmp_path):
    model = Wide()
    whole = lr.calibrate(model, batches(), lr.SampledCrossEntropy())
    folder = tmp_path if staged else None
    stats = lr.calibrate(model, batches(), lr.SampledCrossEntropy(), sketch_above=400, folder=folder)
    assert stats["wide"].gradients.shape == (530, 1 + sketch.COLUMNS)
    torch.testing.assert_close(stats["narrow"].gradients, whole["narrow"].gradients)
    # a moment of 64 rows has rank 8 x 64 at most; here 8 logits make it 8 columns of "narrow"
    exact, found = (Candidate(model.wide, each["wide"]).tails[0] for each in (whole, stats))
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6 * float(exact[0]))
    plans = [lr.make_plan(model, lr.Budget(params=0.5), each) for each in (whole, stats)]
    assert [(entry.name, entry.rank) for entry in plans[0]] == [(entry.name, entry.rank) for entry in plans[1]]
    small, other = (
        lr.factorize_(copied(model), plan, each, batches()) for plan, each in zip(plans, (whole, stats), strict=True)
    )
    x = batches()[0]
    torch.testing.assert_close(small(x), other(x), rtol=1e-3, atol=1e-3)


def copied(model: nn.Module) -> nn.Module:
    other = Wide()
    other.load_state_dict(model.state_dict())
    return other


def test_sketches_are_saved_and_merged(tmp_path):
    model, loss = Wide(), lr.SampledCrossEntropy()
    torch.manual_seed(0)
    one, two = (lr.calibrate(model, part, loss, sketch_above=0) for part in (batches()[:3], batches()[3:]))
    merged = one.merge(two)
    weights = 48 / 64, 16 / 64
    want = sum(w * each["wide"].gradients for w, each in zip(weights, (one, two), strict=True))
    torch.testing.assert_close(merged["wide"].gradients, want)
    merged.save(tmp_path / "stats.safetensors")
    loaded = lr.Statistics.load(tmp_path / "stats.safetensors")
    assert torch.equal(loaded["wide"].gradients, merged["wide"].gradients)
    assert lr.make_plan(model, lr.Budget(params=0.5), loaded) == lr.make_plan(model, lr.Budget(params=0.5), merged)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_metric_of_a_sketch_is_that_of_its_matrix(share):
    rows = torch.randn(300, 600, dtype=torch.double) * torch.logspace(0, -2, 600, dtype=torch.double)
    low = Metric.of_gradients(sketched(rows).second, lr.Damping(output_shrinkage=share))
    whole, plain = (Metric.of_gradients(sketched(rows).second, lr.Damping(outputs=0)) for _ in range(2))
    plain = torch.diag(plain.matrix) + plain.factor @ plain.factor.mT
    ridge = 0.1 * whole.diagonal.mean()
    want = (1 - share) * plain + torch.diag(share * whole.diagonal + ridge)
    torch.testing.assert_close(torch.diag(low.matrix) + low.factor @ low.factor.mT, want)
    dense = Metric(torch.diag(low.matrix) + low.factor @ low.factor.mT)
    x, row = torch.randn(600, 5).double(), torch.randn(5, 600).double()
    torch.testing.assert_close(low.diagonal, dense.diagonal)
    torch.testing.assert_close(low.gram(x), dense.gram(x))
    torch.testing.assert_close(low.root.times(x).mT @ low.root.times(x), dense.gram(x))
    torch.testing.assert_close(low.root.times(low.root.divide(x)), x)
    torch.testing.assert_close(low.root.divide_columns(row) @ low.root.times(x), row @ x)
    torch.testing.assert_close(low.root.solve(x), dense.root.solve(x))


@pytest.mark.parametrize("value", [-1, 2.5, "all"])
def test_bad_limits_are_refused(value):
    with pytest.raises(lr.LowRankError, match="sketch_above"):
        lr.calibrate(Wide(), batches(), sketch_above=value)


@pytest.mark.parametrize("sketch_above", ["all", -1, 1.5, True])
def test_a_width_that_is_no_integer_is_refused_before_anything_is_read(sketch_above, tmp_path):
    with pytest.raises(lr.LowRankError, match="sketch_above"):
        lr.calibrate(Wide(), batches(), lr.SampledCrossEntropy(), sketch_above=sketch_above)
    with pytest.raises(lr.LowRankError, match="sketch_above"):
        lr.compress_checkpoint(
            tmp_path, tmp_path / "small", lr.Budget(params=0.5), batches(), model=Wide(), sketch_above=sketch_above
        )
    assert not (tmp_path / "small").exists()
