"""Transforms from calibration: those of the calibrated tokens and gradients, and the file that holds them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_layers as lr
from lowrank_layers.kv_cache.rope import TILE_FRAME
from lowrank_layers.kv_cache.tile_frame import TileFrame
from lowrank_layers.kv_cache.transform import DAMPING

SIZE, HEADS, KEYS = 8, 2, ["k_proj", "v_proj"]
ROTATION = lr.Rotation.of(SIZE)
TILE, BEFORE = lr.KVSettings(bits=2), lr.KVSettings(bits=2, rope="before")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(12, HEADS * SIZE), nn.Linear(12, HEADS * SIZE)
        self.out = nn.Linear(HEADS * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.k_proj(x) * self.v_proj(x)).tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.fixture
def batches():
    return [(torch.randn(2, 30, 12) @ torch.randn(12, 12) + 1, torch.randint(5, (2, 30))) for _ in range(2)]


@pytest.fixture
def stats(batches):
    torch.manual_seed(0)
    model = Model()
    return model, lr.calibrate(model, batches, mean_loss, target=KEYS)


def outputs_and_gradients(model, name, batches):
    """What a projection puts out, and the gradients there of the sum of all tokens' losses, ``[tokens, outputs]``."""
    rows, gradients = [], []

    def hook(module, args, output):
        rows.append(output.detach().flatten(0, 1))
        output.register_hook(lambda gradient: gradients.append(gradient.flatten(0, 1)))

    handle = model.get_submodule(name).register_forward_hook(hook)
    for x, target in batches:
        F.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum").backward()
    handle.remove()
    return torch.cat(rows).double(), torch.cat(gradients).double()


def second_moment(rows, offsets):
    """That of rows which are seen once with each of the rotations."""
    heads = rows.unflatten(-1, (-1, SIZE)).transpose(0, 1)
    turned = [ROTATION.turn(heads, torch.full((len(rows),), d)) for d in offsets]
    seen = torch.cat(turned, 1).transpose(0, 1).flatten(1)
    return seen.mT @ seen / len(seen)


def blocks(matrix, width):
    count = len(matrix) // width
    return torch.stack([matrix[i * width :, i * width :][:width, :width] for i in range(count)])[None]


@pytest.mark.parametrize("rope", ["before", "tile"])
@pytest.mark.parametrize("joint", [True, False])
def test_transforms_are_those_of_the_calibrated_tokens_and_gradients(stats, batches, rope, joint):
    model, taken = stats
    settings = lr.KVSettings(bits=2, rope=rope, joint=joint)
    found = lr.kv_subspaces(model, taken, settings, head_size=SIZE, rotation=ROTATION)
    width = HEADS * SIZE if joint else SIZE
    tile = [d - (TILE_FRAME - 1) / 2 for d in range(TILE_FRAME)]
    assert len(found) == 2
    for layer, pair in zip(("first", "second"), found, strict=True):
        for name, transform in zip(KEYS, pair, strict=True):
            rows, gradients = outputs_and_gradients(model, f"{layer}.{name}", batches)
            keys = name == "k_proj"
            mean = rows.mean(0) if keys else 0 * rows[0]
            offsets = tile if keys and rope == "tile" else [0]
            covariance = blocks(second_moment(rows - mean, offsets), width)
            metric = blocks(second_moment(gradients, offsets), width)
            metric = metric + DAMPING * metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(width)
            basis, variances = transform.basis.double(), transform.variances.double()
            torch.testing.assert_close(transform.mean.double(), mean.view(1, -1, width), atol=1e-5, rtol=1e-5)
            # these two equations define the transform
            torch.testing.assert_close(basis * variances[..., None, :] @ basis.mT, covariance, atol=1e-4, rtol=1e-4)
            eye = torch.eye(width).double().expand_as(metric)
            torch.testing.assert_close(basis.mT @ metric @ basis, eye, atol=1e-3, rtol=0)
            torch.testing.assert_close(basis.mT @ transform.metric.double() @ basis, eye, atol=1e-3, rtol=0)
            assert bool((variances.diff() <= 0).all())
            assert transform.basis.dtype == torch.float32


def test_layers_without_rotation_keep_their_keys_own_frame(stats):
    model, taken = stats
    mixed = lr.kv_subspaces(model, taken, TILE, head_size=SIZE, rotation=[None, ROTATION])
    before = lr.kv_subspaces(model, taken, BEFORE, head_size=SIZE)
    tile = lr.kv_subspaces(model, taken, TILE, head_size=SIZE, rotation=ROTATION)
    assert torch.equal(mixed[0][0].variances, before[0][0].variances)
    assert torch.equal(mixed[1][0].variances, tile[1][0].variances)
    assert not torch.allclose(before[1][0].variances, tile[1][0].variances, rtol=1e-3)
    assert mixed.rotations == (None, ROTATION)


def test_keys_in_the_frame_of_their_tile_are_the_directions_that_the_frame_gives(stats):
    model, taken = stats
    pair = lr.kv_subspaces(model, taken, TILE, head_size=SIZE, rotation=ROTATION)[0]
    basis = pair[0].basis[0, 0]
    rows = torch.randn(1, 1, 64, HEADS * SIZE)
    inside = TileFrame(ROTATION, SIZE).into(rows, 0)
    coefficients = inside @ (pair[0].metric[0, 0] @ basis)
    torch.testing.assert_close(TileFrame(ROTATION, SIZE).out_of(coefficients @ basis.mT, 0), rows, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_a_file_holds_the_transforms_to_the_rounding_of_their_bases(stats, joint, folder, tmp_path):
    model, taken = stats
    settings = lr.KVSettings(bits=2, joint=joint)
    made = lr.kv_subspaces(model, taken, settings, head_size=SIZE, rotation=[None, ROTATION])
    path = tmp_path if folder else tmp_path / "own.safetensors"
    made.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["kv_transforms.safetensors" if folder else "own.safetensors"]
    held = lr.KVTransforms.load(path)
    assert (held.head_size, held.joint, held.rope) == (SIZE, joint, "tile")
    assert held.rotations[0] is None
    assert held.rotations[1].equals(ROTATION)
    assert len(held) == 2
    held.check(settings)
    for old, new in zip((t for pair in made for t in pair), (t for pair in held for t in pair), strict=True):
        assert torch.equal(new.mean, old.mean)
        assert torch.equal(new.variances, old.variances)
        assert torch.equal(new.basis, old.basis.bfloat16().float())
        basis = new.basis.double()
        eye = torch.eye(basis.shape[-1]).double().expand_as(basis)
        torch.testing.assert_close(basis.mT @ new.metric.double() @ basis, eye, atol=1e-3, rtol=0)
        # of a relative error of 2^-9 in the entries, at most the condition number arrives in the metric
        bound = 2.0**-8 * float(torch.linalg.cond(basis).max()) * basis.shape[-1] ** 0.5
        spread = old.basis.double().mT @ new.metric.double() @ old.basis.double()
        assert float((spread - eye).abs().max()) < bound
    numbers = sum(t.basis.numel() + t.mean.numel() + t.variances.numel() for pair in made for t in pair)
    file = next(tmp_path.iterdir())
    assert 2 * numbers < file.stat().st_size < 4 * numbers + 6000
    assert made.nbytes() == sum(4 * (2 * t.basis.numel() + 2 * t.mean.numel()) for pair in made for t in pair)


def test_transforms_are_a_sequence_that_cannot_be_changed(stats):
    model, taken = stats
    made = lr.kv_subspaces(model, taken, BEFORE, head_size=SIZE)
    assert made[:1] == (made[0],)
    assert list(made) == [made[0], made[-1]]
    assert copy.deepcopy(made) is made
    with pytest.raises(AttributeError):
        made.layers = ()
    for settings, name in ((TILE, "rope"), (lr.KVSettings(bits=2, rope="before", joint=False), "joint")):
        with pytest.raises(lr.LowRankError, match=f"made with {name}"):
            made.check(settings)
    with pytest.raises(lr.LowRankError, match="bits"):
        made.check(lr.KVSettings(rank=2))


def test_files_that_are_torn_or_foreign(stats, tmp_path):
    model, taken = stats
    made = lr.kv_subspaces(model, taken, TILE, head_size=SIZE, rotation=ROTATION)
    path = tmp_path / "kv_transforms.safetensors"
    with pytest.raises(lr.CheckpointError, match="does not exist"):
        made.save(tmp_path / "none" / "own.safetensors")
    with pytest.raises(lr.CheckpointError, match="no such file"):
        lr.KVTransforms.load(tmp_path)
    made.save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lr.CheckpointError, match="torn"):
        lr.KVTransforms.load(tmp_path)
    path.write_bytes(whole)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    (key,) = set(metadata) - {"format"}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(lr.CheckpointError, match="was not written by"):
        lr.KVTransforms.load(path)
    for change in (
        lambda t: t.pop("0.keys.basis"),
        lambda t: t.pop("rotations.0"),
        lambda t: t.update(more=torch.ones(2)),
        lambda t: t["1.values.basis"].fill_(float("nan")),
        lambda t: t["1.values.basis"].fill_(1),
        lambda t: t.update({"0.keys.basis": t["0.keys.basis"][..., :3].contiguous()}),
        lambda t: t.update({"0.keys.mean": t["0.keys.mean"].flatten()}),
        lambda t: t.update({"1.values.variances": t["1.values.variances"][..., :3].contiguous()}),
    ):
        path.write_bytes(whole)
        spoiled = load_file(path)
        change(spoiled)
        save_file(spoiled, tmp_path / "spoiled.safetensors", metadata=metadata)
        with pytest.raises(lr.CheckpointError, match="damaged"):
            lr.KVTransforms.load(tmp_path / "spoiled.safetensors")
    body = json.loads(metadata[key])
    for spoiled in (body | {"version": 9}, {"version": 1}, body | {"layers": [7, 7]}, [], "no json"):
        text = spoiled if isinstance(spoiled, str) else json.dumps(spoiled)
        save_file(tensors, path, metadata={"format": "pt", key: text})
        with pytest.raises(lr.CheckpointError, match=r"damaged|torn"):
            lr.KVTransforms.load(path)


def test_what_transforms_need_is_asked_for(stats, batches):
    model, taken = stats
    without_loss = lr.calibrate(model, [x for x, _ in batches], target=KEYS)
    with pytest.raises(lr.LowRankError, match=r"without a loss.*SampledCrossEntropy"):
        lr.kv_subspaces(model, without_loss, BEFORE, head_size=SIZE)
    with pytest.raises(lr.LowRankError, match="without rotation="):
        lr.kv_subspaces(model, taken, TILE, head_size=SIZE)
    with pytest.raises(lr.LowRankError, match="got 1 rotations, expected one for each of 2"):
        lr.kv_subspaces(model, taken, TILE, head_size=SIZE, rotation=[ROTATION])
    with pytest.raises(lr.LowRankError, match="knows no positions; use rope='tile'"):
        lr.kv_subspaces(model, taken, lr.KVSettings(bits=2, rope="after"), head_size=SIZE)


@pytest.mark.parametrize("settings", [BEFORE, lr.KVSettings(rank=2)], ids=["bits", "rank"])
@pytest.mark.parametrize("norm", ["k_norm", "k_layernorm"])
def test_keys_that_are_normalized_after_their_projection_are_refused(batches, settings, norm):
    model = Model()
    model.first.add_module(norm, nn.Identity())
    stats = lr.calibrate(model, batches, mean_loss, target=KEYS)
    assert len(lr.kv_subspaces(model, stats, settings, head_size=SIZE)) == 2
    model.first.add_module(norm, nn.LayerNorm(SIZE))
    with pytest.raises(lr.LowRankError, match=f"'first' applies '{norm}'"):
        lr.kv_subspaces(model, stats, settings, head_size=SIZE)


def test_fused_projections_are_refused_with_what_to_do():
    model = nn.Sequential(nn.Linear(8, 24))
    stats = lr.calibrate(model, [torch.randn(4, 8)])
    with pytest.raises(lr.LowRankError, match=r"split a layer .* calibrate_kv needs neither"):
        lr.kv_subspaces(model, stats, BEFORE, head_size=SIZE)
