"""Buffers and parameters that share memory: saved where nothing is lost, else refused by name."""

import pytest
import torch
from torch import nn

import lowrank_layers as lr


class Views(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


weight = torch.arange(24.0).view(4, 6)
APART = {
    "halves": (weight[:2], weight[2:]),
    "columns": (weight[:, :3], weight[:, 3:]),
    "alternating columns": (weight[:, ::2], weight[:, 1::2]),
    "a gap": (weight[0], weight[3]),
    "other dtypes": (weight[0], weight[3].view(torch.int32)),
    "expanded": (weight[0, :1].expand(5), weight[1]),
}


@pytest.mark.parametrize("pair", APART.values(), ids=APART)
def test_parts_of_one_tensor_without_common_elements_go_round(pair, tmp_path):
    model = Views(a=pair[0], b=pair[1])
    lr.save(model, tmp_path / "m.safetensors")
    loaded = lr.load(tmp_path / "m.safetensors", into=Views(a=torch.zeros_like(pair[0]), b=torch.zeros_like(pair[1])))
    assert torch.equal(loaded.a, pair[0])
    assert torch.equal(loaded.b, pair[1])


OVERLAPPING = {
    "a part": (weight, weight[:2]),
    "a row and a column": (weight[0], weight[:, 0]),
    "shifted": (weight[:3], weight[1:]),
    "transposed": (weight, weight.mT),
    "reshaped": (weight, weight.view(24)),
    "as integers": (weight, weight.view(torch.int32)),
    "as other sizes": (weight[:2], weight[1:].view(torch.int16)),
}


@pytest.mark.parametrize("pair", OVERLAPPING.values(), ids=OVERLAPPING)
def test_views_with_common_elements_are_refused_by_name(pair, tmp_path):
    with pytest.raises(lr.CheckpointError, match=r"'b' and 'a' are different views of the same memory.*\.clone\(\)"):
        lr.save(Views(a=pair[0], b=pair[1]), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_one_tensor_under_two_names_is_stored_once(tmp_path):
    lr.save(Views(a=weight, b=weight), tmp_path / "m.safetensors")
    loaded = lr.load(tmp_path / "m.safetensors", into=Views(a=torch.zeros(4, 6), b=torch.zeros(4, 6)))
    assert torch.equal(loaded.a, weight)
    assert torch.equal(loaded.b, weight)


def test_a_weight_that_is_the_transpose_of_another_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().mT)
    with pytest.raises(lr.CheckpointError, match=r"'1\.weight' and '0\.weight'"):
        lr.save(model, tmp_path / "m.safetensors")


def test_sparse_buffers_are_refused_by_name(tmp_path):
    with pytest.raises(lr.CheckpointError, match=r"'a' is a torch\.sparse_coo tensor.*to_dense"):
        lr.save(Views(a=weight.to_sparse()), tmp_path / "m.safetensors")
