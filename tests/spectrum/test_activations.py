"""Principal components equal scikit-learn's of all activations at once, without padding."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

import lowrank_layers as lr


def collected(model, batches, name, channels):
    """All rows that a module put out, with its features in the last dimension."""
    rows = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda *call: rows.append(call[2].movedim(channels, -1).flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    return torch.cat(rows).double().numpy()


def assert_is_pca(found, rows):
    pca = PCA(svd_solver="full").fit(rows)
    n = len(pca.explained_variance_)
    assert found.rows == len(rows)
    scale = pca.explained_variance_[0]
    assert found.variances[:n].numpy() == pytest.approx(pca.explained_variance_, rel=1e-5, abs=1e-7 * scale)
    ratio = found.explained_variance_ratio[:n].numpy()
    assert ratio == pytest.approx(pca.explained_variance_ratio_, rel=1e-5, abs=1e-7)
    assert found.mean.numpy() == pytest.approx(pca.mean_, rel=1e-5, abs=1e-7)
    for k in range(3):
        assert abs(found.components[k].numpy() @ pca.components_[k]) == pytest.approx(1, rel=1e-5)
    p = pca.singular_values_ / pca.singular_values_.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_images_and_vectors():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 9)
    )
    batches = [torch.randn(20, 3, 8, 8) + 3 for _ in range(3)]
    found = lr.activation_spectrum(model, batches, target=["0", nn.ReLU, "3", "5"])
    assert model.training
    model.eval()
    assert [layer.name for layer in found] == ["0", "2", "3", "5"]
    for name in ("0", "2", "3"):
        assert_is_pca(found[name], collected(model, batches, name, 1))
    assert_is_pca(found["5"], collected(model, batches, "5", -1))
    assert len(str(found).splitlines()) == 6


def test_a_large_mean_costs_no_digits():
    model = nn.Sequential(nn.Linear(5, 5, bias=False, dtype=torch.float64))
    batches = [torch.randn(50, 5, dtype=torch.float64) + 1e6 for _ in range(4)]
    assert_is_pca(lr.activation_spectrum(model, batches)["0"], collected(model, batches, "0", -1))


class Text(nn.Module):
    """A model with a mask, tuples inside, and convolutions that shorten the text."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.rnn = nn.GRU(12, 10, batch_first=True)
        self.conv = nn.Conv1d(10, 8, 3)
        self.act = nn.Conv1d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask):
        x, _ = self.rnn(self.embed(input_ids))
        return self.head(self.act(self.conv(x.mT)).mT)


def test_padding_is_left_out():
    model = Text()
    ids = torch.randint(50, (4, 9))
    lengths = [9, 5, 7, 3]
    mask = torch.zeros(4, 9, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    every = ["embed", "rnn", "conv", "act", "head"]
    padded = lr.activation_spectrum(model, [{"input_ids": ids, "attention_mask": mask}], target=every)
    alone = lr.activation_spectrum(
        model,
        [
            {"input_ids": each[None, :length], "attention_mask": torch.ones(1, length)}
            for each, length in zip(ids, lengths, strict=True)
        ],
        target=every,
    )
    for name in every:
        assert padded[name].rows == alone[name].rows, name
        torch.testing.assert_close(padded[name].variances, alone[name].variances, rtol=1e-5, atol=1e-7)
    assert padded["embed"].rows == sum(lengths)
    assert padded["conv"].rows == sum(length - 2 for length in lengths)


def test_transformer_layers_and_a_mask_that_is_given():
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 3))
    x, real = torch.randn(3, 6, 12), torch.arange(6) < torch.tensor([[6], [2], [4]])
    found = lr.activation_spectrum(model, [x], mask=lambda batch: real, target=[nn.TransformerEncoderLayer, "1"])
    assert [layer.name for layer in found] == ["0.layers.0", "0.layers.1", "1"]
    model.eval()
    with torch.no_grad():
        hidden = model[0](x)
    assert_is_pca(found["0.layers.1"], hidden[real].double().numpy())
    assert_is_pca(found["1"], model[1](hidden[real]).detach().double().numpy())


def test_factored_layers_have_the_features_of_dense_ones():
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    low = nn.Sequential(lr.LowRankConv1d.from_dense(model[0], rank=6))
    batches = [torch.randn(10, 4, 20)]
    dense, factored = (lr.activation_spectrum(each, batches)["0"] for each in (model, low))
    torch.testing.assert_close(dense.variances, factored.variances, rtol=1e-5, atol=1e-7)


def test_refuses():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(lr.LowRankError, match="no module saw any data"):
        lr.activation_spectrum(model, [])
    with pytest.raises(lr.LowRankError, match=r"expected a list of batches; write \[batch\]"):
        lr.activation_spectrum(model, torch.randn(3, 3))
    with pytest.raises(lr.LowRankError, match="output of '0' has NaN or Inf"):
        lr.activation_spectrum(model, [torch.full((2, 3), float("nan"))])
    with pytest.raises(lr.LowRankError, match="matches no module"):
        lr.activation_spectrum(model, [torch.randn(2, 3)], target=["fc"])
    assert not model[0]._forward_hooks
