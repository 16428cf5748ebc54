"""A cache in a file: what it holds, and files that are torn or foreign."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowrank_layers as lr
from lowrank_layers.kv_cache.bit_coefficients import PER_OCTAVE
from lowrank_layers.kv_cache.transformers.cache_file import KEY, VERSION

from ...contracts.tables import RULES
from .caches import IDS, WARNINGS, exact, through_a_file
from .tiny_models import tiny

pytestmark = WARNINGS


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "gpt2"])
def test_files_hold_layers_with_windows_and_without_rotation(kind, tmp_path):
    net = tiny(kind, "lowrank")
    cache = exact(config=net.config)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        other = through_a_file(cache, tmp_path)
        a, b = (net(IDS[:, :1], past_key_values=c).logits for c in (cache, other))
    assert torch.equal(a, b)


def test_files_that_are_torn_or_foreign(tmp_path):
    cache, path = exact(), tmp_path / "cache.safetensors"
    with torch.no_grad():
        tiny("llama", "lowrank")(IDS, past_key_values=cache)
    with pytest.raises(lr.CheckpointError, match="does not exist"):
        cache.save(tmp_path / "none" / "cache.safetensors")
    with pytest.raises(lr.CheckpointError, match="no such file"):
        lr.LowRankCache.load(path)
    cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lr.CheckpointError, match="torn"):
        lr.LowRankCache.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(lr.CheckpointError, match="was not written by"):
        lr.LowRankCache.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for change in (
        lambda t: t.pop("0.keys.tail"),
        lambda t: t.pop("0.values.0.values"),
        lambda t: t.pop("1.keys.first"),
        lambda t: t.update(more=torch.ones(2)),
        lambda t: t["1.values.0.values"].fill_(float("nan")),
        lambda t: t.update({"0.keys.0.basis": t["0.keys.0.basis"][:, :, :, :3].contiguous()}),
        lambda t: t.update({"0.keys.0.values": t["0.keys.0.values"][..., :3].contiguous()}),
    ):
        spoiled = load_file(path)
        change(spoiled)
        save_file(spoiled, tmp_path / "spoiled.safetensors", metadata=metadata)
        with pytest.raises(lr.CheckpointError, match="damaged"):
            lr.LowRankCache.load(tmp_path / "spoiled.safetensors")
    save_file(tensors, path, metadata=metadata | {"lowrank_layers.cache": '{"version": 9}'})
    with pytest.raises(lr.CheckpointError, match="damaged"):
        lr.LowRankCache.load(path)


def without_threes(body):
    """With the numbers of directions of 8, 4, 2 and 1 bits alone, as the first version wrote them."""
    if isinstance(body, list):
        return [without_threes(each) for each in body]
    if not isinstance(body, dict):
        return body
    return {key: [*value[:2], *value[3:]] if key == "widths" else without_threes(value) for key, value in body.items()}


def test_a_file_of_the_first_version_has_coarser_gains_and_no_three_bits(tmp_path):
    """Its gains are powers of the square root of two, of which the gains of today are a part."""
    net, path = tiny("llama", "lowrank"), tmp_path / "cache.safetensors"
    cache = exact(rank=None, bits=3)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        cache.save(path)
        tensors = load_file(path)
        names = [name for name in tensors if name.endswith(".gains")]
        assert names
        coarse = {name: tensors[name] // (PER_OCTAVE // 2) for name in names}
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        outputs = []
        for version, factor in ((1, 1), (VERSION, PER_OCTAVE // 2)):
            body = json.loads(metadata[KEY]) | {"version": version}
            old = metadata | {KEY: json.dumps(without_threes(body) if version == 1 else body)}
            save_file(tensors | {name: gains * factor for name, gains in coarse.items()}, path, metadata=old)
            outputs.append(net(IDS[:, :1], past_key_values=lr.LowRankCache.load(path)).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("rule", [row.rule for row in RULES] + [lr.ParameterFraction(0.5)], ids=repr)
def test_every_rank_rule_can_be_saved(rule, tmp_path):
    cache = exact(rank=rule, joint=False)
    cache.update(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), 0)
    assert through_a_file(cache, tmp_path).settings == cache.settings


def test_a_rank_rule_of_the_users_own_cannot_be_saved(tmp_path):
    cache = exact(rank=lambda spectrum: 4)
    cache.update(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16), 0)
    with pytest.raises(lr.LowRankError, match=r"expected an integer or one of .*Energy"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
