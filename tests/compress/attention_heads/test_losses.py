"""What smaller heads lose: pairs that turn at another frequency by rotation matrices, and parts of what there is."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.calibrate.layer_stats import LayerStats
from lowrank_layers.compress.attention_heads.find import Attention
from lowrank_layers.compress.attention_heads.losses import lost_by_keys
from lowrank_layers.compress.attention_heads.maps import HeadMaps
from lowrank_layers.compress.attention_heads.problem import HeadProblem
from lowrank_layers.compress.attention_heads.rotary_pairs import Band, seen_means

FREQUENCIES = torch.tensor([0.9, 0.5, 0.1]).double()
CONTEXT = 100
GROUPS, SIZE = 2, 6


def rotation(angles: Tensor) -> Tensor:
    """The matrix by which RoPE turns two heads."""
    c, s = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.block_diag(*[torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)])] * GROUPS)


def attention() -> Attention:
    """Two heads of keys of six entries, each read by one head."""
    layers = {key: nn.Linear(8, GROUPS * SIZE, bias=False) for key in ("q_proj", "k_proj", "v_proj")}
    module = SimpleNamespace(head_dim=SIZE, o_proj=nn.Linear(GROUPS * SIZE, 8, bias=False), **layers)
    for layer in (*layers.values(), module.o_proj):
        layer.double().requires_grad_(False)
    return Attention("attention", module)


def stats_of(layer: nn.Module, rows: Tensor) -> LayerStats:
    return lr.calibrate(nn.Sequential(layer), [rows])["0"]


def problem_of(each: Attention, x: Tensor, values: Tensor) -> tuple[HeadProblem, LayerStats]:
    keys, outputs = stats_of(each.module.k_proj, x), stats_of(each.module.o_proj, values)
    seen = seen_means(FREQUENCIES, CONTEXT)
    return HeadProblem.of(each, keys, outputs, seen, lr.Damping(inputs=0.0)), keys


def test_what_pairs_lose_at_a_common_frequency_is_the_mean_weighted_error_of_turned_keys():
    """Pairs whose two entries count alike, so that it does not matter at what angle they start."""
    gradients, moment = (torch.diag(torch.rand(GROUPS, 1, 3).double().expand(-1, 2, -1).flatten()) for _ in range(2))
    each, common = attention(), torch.tensor(0.7).double()
    problem = HeadProblem(each, torch.empty(0), moment, torch.empty(0), torch.empty(0))
    stats = LayerStats(None, gradients, positions=4.0)
    whole = torch.eye(SIZE).double().expand(GROUPS, -1, -1)
    bands = {4: [(Band(0, 2, 1), common), (Band(2, 3, 1), FREQUENCIES[2])]}
    maps = {4: HeadMaps(whole, whole, whole, whole)}
    found = lost_by_keys(problem, stats, lr.Damping(outputs=0.0), maps, bands, FREQUENCIES, CONTEXT)
    losses = []
    for distance in torch.logspace(0, 2, 64).double():
        turned = rotation(distance * torch.tensor([common - 0.9, common - 0.5, 0])) - torch.eye(GROUPS * SIZE)
        losses.append(0.5 * 4 * float((gradients @ turned @ moment @ turned.mT).trace()))
    alone, detuned = found[4]
    assert alone == pytest.approx(0, abs=1e-12)
    assert detuned == pytest.approx(sum(losses) / len(losses))


def test_without_gradients_all_keys_lose_what_there_is_of_their_projection():
    each, x = attention(), torch.randn(50, 8).double()
    problem, stats = problem_of(each, x, torch.randn(50, GROUPS * SIZE).double())
    bands = {0: [(Band(k, k + 1, 0), frequency) for k, frequency in enumerate(FREQUENCIES)]}
    nothing = torch.zeros(GROUPS, 0, SIZE).double()
    maps = {0: HeadMaps(nothing, nothing, nothing, nothing)}
    found = lost_by_keys(problem, stats, lr.Damping(inputs=0.0), maps, bands, FREQUENCIES, CONTEXT)
    energy = 0.5 * stats.positions * (x @ each.module.k_proj.weight.mT).square().sum(1).mean()
    assert sum(found[0]) == pytest.approx(float(energy))


def test_readers_of_values_are_weighted_by_the_gradients_where_they_are_known():
    """``E[g g^T]`` of the readers of a group is ``W^T G W`` over its heads."""
    each, values = attention(), torch.randn(50, GROUPS * SIZE).double()
    gradients = torch.randn(30, 8).double()
    outputs = stats_of(each.module.o_proj, values).changed(gradients=gradients.mT @ gradients / 30)
    keys = stats_of(each.module.k_proj, torch.randn(50, 8).double())
    seen, damping = seen_means(FREQUENCIES, CONTEXT), lr.Damping(inputs=0.0, outputs=0.0)
    problem = HeadProblem.of(each, keys, outputs, seen, damping)
    columns = each.module.o_proj.weight.unflatten(1, (GROUPS, SIZE))
    for group in range(GROUPS):
        rows = gradients @ columns[:, group] / 30**0.5
        assert torch.allclose(problem.readers[group], rows.mT @ rows)
        own = values.unflatten(1, (GROUPS, SIZE))[:, group]
        assert torch.allclose(problem.values[group], own.mT @ own / 50)


def test_both_maps_of_a_product_undo_each_other():
    each = attention()
    problem, _ = problem_of(each, torch.randn(50, 8).double(), torch.randn(50, GROUPS * SIZE).double())
    maps = problem.maps([Band(0, 2, 1), Band(2, 3, 1)], 4)
    for readers, entries in ((maps.queries, maps.keys), (maps.outputs, maps.values)):
        assert readers.shape == entries.shape == (GROUPS, 4, SIZE)
        assert torch.allclose(entries @ readers.mT, torch.eye(4).double().expand(GROUPS, -1, -1))
    weights = maps.cut(each)
    assert torch.allclose(weights["v_proj"][0], torch.block_diag(*maps.values) @ each.module.v_proj.weight)
    smaller = torch.block_diag(*maps.keys) @ maps.key_projector @ each.module.k_proj.weight
    assert torch.allclose(weights["k_proj"][0], smaller)
