"""What cannot be drawn is refused in words, before any figure is made."""

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import lowrank_layers as lr
from lowrank_layers import plot

MATRIX, TENSOR = torch.rand(6, 5), torch.rand(3, 4, 5)
SVD, NMF = lr.svd(MATRIX, 2), lr.nmf(MATRIX, 2)
MODEL = nn.Sequential(nn.Linear(4, 4))
PLAN = lr.make_plan(MODEL, rank=2)

CASES = {
    "pictures in a list": (lambda: plot.image_strip([MATRIX]), "got list, expected a dict of pictures"),
    "a picture in an array": (lambda: plot.image_strip({"a": MATRIX.numpy()}), r"got ndarray for 'a', .*as_tensor"),
    "a matrix in an array": (lambda: plot.approximation(MATRIX.numpy(), SVD), r"got ndarray, expected a torch\.Tensor"),
    "no factorization": (lambda: plot.approximation(MATRIX, MATRIX), "got Tensor, expected a factorization"),
    "a tensor in an array": (lambda: plot.tensor_scatter(TENSOR.numpy(), SVD), "got ndarray, expected a torch"),
    "a tensor for a core": (lambda: plot.tensor_scatter(TENSOR, TENSOR), "got Tensor, expected a factorization"),
    "an SVD for a CP": (lambda: plot.cp_factors(SVD), "got SVD, expected what cp returned"),
    "an SVD for an NMF": (lambda: plot.nmf_factors(MATRIX, SVD), "got SVD, expected what nmf returned"),
    "fits without labels": (lambda: plot.error_against_rank(MATRIX, [SVD]), "got list, expected a dict with fact"),
    "a single fit": (lambda: plot.error_against_rank(MATRIX, {"a": SVD}), "got SVD, expected a dict with fact"),
    "numbers for fits": (lambda: plot.error_against_rank(MATRIX, {"a": [1]}), "got int, expected factorizations"),
    "starts without ranks": (lambda: plot.stability_against_rank(MATRIX, [NMF]), "got list, expected a dict"),
    "starts of an SVD": (lambda: plot.stability_against_rank(MATRIX, {2: [SVD, SVD]}), "expected factorizations of cp"),
    "points without labels": (lambda: plot.accuracy_against_size([(1, 2)]), r"a dict with points \(x, y\) for each"),
    "points of one number": (lambda: plot.accuracy_against_size({"a": [1, 2]}), "cannot unpack"),
    "a dense size": (lambda: plot.accuracy_against_size({"a": [(1, 2)]}, dense=3), "cannot unpack"),
    "losses without labels": (lambda: plot.losses([2.0, 1.0]), "got list, expected a dict with numbers"),
    "words for losses": (lambda: plot.losses({"a": ["low"]}), "could not convert string"),
    "None for bytes": (lambda: plot.perplexity_against_bytes({"a": [(None, 2)]}), "not 'NoneType'"),
    "None for curves": (lambda: plot.loss_against_wire_bytes(None), "got NoneType"),
    "no axes": (lambda: plot.losses({"a": [1.0]}, ax=3), "got ax=3, expected axes of matplotlib"),
    "a front without labels": (lambda: plot.size_score_front([(1, 2)]), "got list"),
    "a plan for a recovery": (lambda: plot.recovery(PLAN), "got Plan, expected what recover_ returned"),
    "None for a progression": (lambda: plot.progression(None), "expected what progressive_ returned"),
    "a model for a plan": (lambda: plot.plan(MODEL), "got Sequential, expected a plan"),
    "a plan for a model": (lambda: plot.spectra(PLAN, MODEL), "got Plan, expected the dense model"),
    "another model": (lambda: plot.spectra(nn.Sequential(nn.ReLU()), PLAN), "'0' of the plan is no dense layer"),
    "other statistics": (lambda: plot.spectra(MODEL, PLAN, {}), "'0' of the plan is not in the statistics"),
    "no records": (lambda: plot.monitor_curves([1]), "got int, expected the records of a SpectrumMonitor"),
    "no panels": (lambda: plot.panels(0), "got count=0"),
    "no figure": (lambda: plot.save_figure("a", "a.png"), "got str, expected a figure"),
}


@pytest.mark.parametrize(("draw", "message"), CASES.values(), ids=CASES)
def test_it_is_refused(draw, message):
    with pytest.raises(lr.LowRankError, match=message):
        draw()
    assert not plt.get_fignums()


def test_a_format_that_matplotlib_does_not_write_leaves_no_file(tmp_path):
    with pytest.raises(lr.LowRankError, match=r"got the file .*figure\.xyz', expected one of \..*\.png"):
        plot.save_figure(plot.panels(1)[0], tmp_path / "figure.xyz")
    assert not list(tmp_path.iterdir())


def test_a_compressed_model_is_not_the_dense_one():
    model = nn.Sequential(nn.Linear(8, 8))
    plan = lr.make_plan(model, rank=2)
    lr.factorize_(model, plan)
    with pytest.raises(lr.LowRankError, match="no dense layer"):
        plot.spectra(model, plan)


def test_spectra_of_an_attention_are_those_of_its_projections():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    plan = lr.make_plan(model, rank=2)
    axes = plot.spectra(model, plan).axes[0]
    assert len(axes.get_legend().get_texts()) == len(plan) == 4
    assert type(model["attention"]) is nn.MultiheadAttention
