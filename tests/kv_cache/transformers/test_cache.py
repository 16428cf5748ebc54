"""transformers' models with LowRankCache: at full rank DynamicCache's very tokens, below it what is to be expected."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import lowrank_layers as lr

from ..tiny import KINDS, ROTATIONS, model

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = pytest.mark.parametrize("implementation", ["lowrank", "sdpa"])
IDS = torch.randint(2, 96, (2, 40), generator=torch.Generator().manual_seed(1))
ONE = IDS[:1]
KEEP = {"keep_recent": 6, "keep_first": 2, "block": 4}


def exact(**changes):
    """A cache whose coefficients hold everything."""
    return lr.LowRankCache(**{"rank": 16, **KEEP, **changes})


@pytest.fixture(scope="module")
def llamas():
    lr.LowRankCache  # noqa: B018 - transformers knows the implementation from here on
    return {name: model("llama", name) for name in ("lowrank", "sdpa")}


def compressed(cache):
    """At least one layer has coefficients, so that a test looked at them."""
    return any(getattr(layer, "compressed", 0) > 0 for layer in cache.layers)


def same(net, ids=ONE, cache=None, tokens=12, **options):
    cache = exact() if cache is None else cache
    torch.manual_seed(5)
    ours = net.generate(ids, past_key_values=cache, max_new_tokens=tokens, **{"do_sample": False, **options})
    torch.manual_seed(5)
    theirs = net.generate(ids, past_key_values=DynamicCache(), max_new_tokens=tokens, **{"do_sample": False, **options})
    assert torch.equal(ours, theirs)
    assert compressed(cache)
    return cache


@pytest.mark.parametrize("configured", [False, True])
@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_generates_the_same_tokens(kind, implementation, configured):
    lr.LowRankCache  # noqa: B018
    eager = kind in ("gpt_oss", "gemma2", "gptj")
    net = model(kind, "eager" if eager and implementation == "sdpa" else implementation)
    cache = exact(config=net.config if configured else None)
    ours = net.generate(IDS, past_key_values=cache, max_new_tokens=12, do_sample=False)
    net.set_attn_implementation("eager" if eager else "sdpa")
    assert torch.equal(ours, net.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=12, do_sample=False))
    latent = kind.startswith("deepseek") and hasattr(net.model.layers[0].self_attn, "expand_kv")
    windows = configured and "sliding_attention" in (getattr(net.config, "layer_types", None) or ())
    if latent:
        assert not compressed(cache)
        return
    if configured and kind == "mistral":
        assert not compressed(cache)
        return
    assert compressed(cache)
    assert not windows or not isinstance(cache.layers[0], type(cache.layers[1]))
    rotation = cache.layers[1].kv.rotation
    found = None if rotation is None else (len(rotation.frequencies), rotation.interleaved, rotation.start)
    assert found == ROTATIONS[kind]


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 9},
        {"repetition_penalty": 1.3},
        {"use_cache": True, "output_logits": True, "min_new_tokens": 4},
    ],
    ids=str,
)
def test_ways_of_decoding(llamas, implementation, options):
    same(llamas[implementation], IDS[:1] if "prefill_chunk_size" not in options else IDS, **options)


@BOTH
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
def test_padding_on_the_left(kind, implementation):
    lr.LowRankCache  # noqa: B018
    mask = torch.ones_like(IDS)
    mask[1, :13] = 0
    net = model(kind, implementation)
    same(net, torch.where(mask.bool(), IDS, 0), attention_mask=mask)
    same(net, torch.where(mask.bool(), IDS, 0), attention_mask=mask, num_beams=2)


@BOTH
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["assistant", "lookup"])
def test_assisted_decoding_crops(llamas, implementation, options):
    ids = torch.cat([ONE, ONE[:, :20]], 1)
    options = options or {"assistant_model": model("llama", num_hidden_layers=1)}
    cache = same(llamas[implementation], ids, tokens=20, **options)
    assert cache.get_seq_length() == ids.shape[1] + 19


@BOTH
def test_a_second_turn_goes_on_with_the_same_cache(llamas, implementation):
    net, cache = llamas[implementation], exact()
    first = same(net, cache=cache)
    assert first.get_seq_length() == ONE.shape[1] + 11
    said = net.generate(ONE, max_new_tokens=12, do_sample=False)
    more = torch.cat([said, ONE[:, :5]], 1)
    second = net.generate(more, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(second, net.generate(more, max_new_tokens=8, do_sample=False))


def through_a_file(cache, tmp_path):
    cache.save(tmp_path / "cache.safetensors")
    return lr.LowRankCache.load(tmp_path / "cache.safetensors")


COPIES = {
    "copy": lambda cache, path: copy.deepcopy(cache),
    "pickle": lambda cache, path: pickle.loads(pickle.dumps(cache)),
    "file": through_a_file,
}


@BOTH
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.int8, "rank": 8}, {"rank": lr.Energy(0.9), "joint": False}], ids=str
)
def test_copies_go_on_alone(llamas, implementation, way, changes, tmp_path):
    net, cache = llamas[implementation], exact(**changes)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        other = COPIES[way](cache, tmp_path)
        assert other.settings == cache.settings
        assert other.nbytes() <= cache.nbytes()
        a = [net(IDS[:, k : k + 1], past_key_values=cache).logits for k in range(10)]
        assert other.get_seq_length() == 40
        b = [net(IDS[:, k : k + 1], past_key_values=other).logits for k in range(10)]
    assert compressed(cache)
    torch.testing.assert_close(torch.cat(a), torch.cat(b), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "gpt2"])
def test_files_hold_layers_with_windows_and_without_rotation(kind, tmp_path):
    lr.LowRankCache  # noqa: B018
    net = model(kind, "lowrank")
    cache = exact(config=net.config)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        other = through_a_file(cache, tmp_path)
        a, b = (net(IDS[:, :1], past_key_values=c).logits for c in (cache, other))
    assert torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("amount", [-1, -9, -30, torch.tensor(-9), 31, 40, 100, 0, 3, -40])
def test_crop_in_all_its_forms(llamas, implementation, amount):
    net, cache, plain = llamas[implementation], exact(), DynamicCache()
    left = min(int(amount), 40) if amount > 0 else 40 + int(amount)
    with torch.no_grad():
        net(IDS, past_key_values=cache)
        cache.crop(amount)
        assert cache.get_seq_length() == left
        assert all(layer.get_mask_sizes(2) == (left + 2, 0) for layer in cache.layers)
        if left:
            net(IDS[:, :left], past_key_values=plain)
        ours, theirs = (net(IDS[:, 7:17], past_key_values=c).logits for c in (cache, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@BOTH
def test_rows_of_the_batch_repeated_selected_and_reordered(llamas, implementation):
    net = llamas[implementation]
    caches = exact(), DynamicCache()
    with torch.no_grad():
        for cache in caches:
            net(IDS, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0, 2]))
            cache.batch_select_indices(torch.tensor([True, True, False]))
            cache.reorder_cache(torch.tensor([1, 1]))
        ours, theirs = (net(IDS[:, :3], past_key_values=cache).logits for cache in caches)
    assert compressed(caches[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("configured", [False, True])
def test_reset_starts_afresh(implementation, configured):
    lr.LowRankCache  # noqa: B018
    net = model("gemma3", implementation)
    cache = exact(config=net.config if configured else None)
    a = same(net, cache=cache).get_seq_length()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert same(net, IDS, cache=cache).get_seq_length() == a


def test_the_implementation_may_change_in_the_middle(llamas):
    net, cache, plain = model("llama", "sdpa"), exact(), DynamicCache()
    with torch.no_grad():
        for step, name in enumerate(("sdpa", "lowrank", "eager", "lowrank")):
            net.set_attn_implementation(name)
            ours = net(IDS[:, step * 10 : step * 10 + 10], past_key_values=cache).logits
            net.set_attn_implementation("sdpa")
            theirs = net(IDS[:, step * 10 : step * 10 + 10], past_key_values=plain).logits
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert compressed(cache)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_the_implementation_serves_other_caches_and_none(kind):
    lr.LowRankCache  # noqa: B018
    net = model(kind, "lowrank")
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    with torch.no_grad():
        ours = net(IDS, attention_mask=mask, use_cache=False).logits
        cached = net(IDS, attention_mask=mask, past_key_values=DynamicCache(config=net.config)).logits
        net.set_attn_implementation("eager")
        theirs = net(IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1, 5:], theirs[1, 5:], rtol=0, atol=1e-5)
    torch.testing.assert_close(cached[0], theirs[0], rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize(
    "changes", [{}, {"rope": "after"}, {"joint": False}, {"dtype": torch.int8}, {"value_rank": 2}], ids=str
)
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_below_full_rank_the_prompt_is_exact_and_decoding_sees_what_is_stored(kind, implementation, changes):
    lr.LowRankCache  # noqa: B018
    plain_name = "eager" if kind == "gpt_oss" else "sdpa"
    net = model(kind, "lowrank" if implementation == "lowrank" else plain_name)
    cache, plain = exact(**{"rank": 5, **changes}), DynamicCache()
    with torch.no_grad():
        ours = net(IDS, past_key_values=cache).logits
        stored = [layer.kv.dense() for layer in cache.layers]
        decoded = net(IDS[:, :3], past_key_values=cache).logits
        net.set_attn_implementation(plain_name)
        torch.testing.assert_close(ours, net(IDS, past_key_values=plain).logits, rtol=0, atol=1e-5)
        lossy = 0.0
        for layer, (keys, values) in zip(plain.layers, stored, strict=True):
            lossy = max(lossy, float((layer.keys - keys).abs().max()))
            layer.keys, layer.values = keys, values
        expected = net(IDS[:, :3], past_key_values=plain).logits
    assert compressed(cache)
    assert lossy > 1e-3
    torch.testing.assert_close(decoded, expected, rtol=0, atol=2e-5)


def test_the_rotation_is_taken_off_before_compressing():
    """Constant keys under RoPE have rank two a pair; without it they are one point."""
    lr.LowRankCache  # noqa: B018
    net = model("llama", "lowrank")
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.k_proj.weight[:] = layer.self_attn.k_proj.weight[:1]
        losses = {}
        for rope in ("before", "after"):
            cache, plain = exact(rank=1, rope=rope, joint=False), DynamicCache()
            for one in (cache, plain):
                net(ONE, past_key_values=one)
            found = cache.layers[0].kv.dense()[0]
            losses[rope] = float((found - plain.layers[0].keys).norm() / plain.layers[0].keys.norm())
    assert losses["before"] < 1e-5
    assert losses["after"] > 0.1


@BOTH
def test_gradients_reach_the_keys(llamas, implementation):
    found = []
    for cache in (exact(), DynamicCache()):
        net = copy.deepcopy(llamas[implementation])
        net(IDS, past_key_values=cache).logits.square().sum().backward()
        assert cache.get_seq_length() == 40
        found.append(net.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*found)


def test_dropout_in_training_is_refused_where_coefficients_are_read():
    lr.LowRankCache  # noqa: B018
    net = model("llama", "lowrank", attention_dropout=0.1).train()
    with torch.no_grad(), pytest.raises(lr.LowRankError, match=r"model\.eval\(\)"):
        net(IDS, past_key_values=exact())


def test_rebuilding_is_said_once(llamas):
    cache = exact()
    with pytest.warns(UserWarning, match="set_attn_implementation") as caught:
        llamas["sdpa"].generate(ONE, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert len([w for w in caught if "LowRankCache" in str(w.message)]) == 1
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llamas["lowrank"].generate(ONE, past_key_values=exact(), max_new_tokens=4, do_sample=False)


def test_bytes_are_all_bytes_with_the_table_once():
    lr.LowRankCache  # noqa: B018
    net = model("llama", "lowrank", num_hidden_layers=3)
    cache = exact()
    net.generate(ONE, past_key_values=cache, max_new_tokens=4, do_sample=False)
    layers = sum(layer.kv.nbytes() for layer in cache.layers)
    assert cache.nbytes() == layers + cache.layers[0].kv.rotation.nbytes()
    assert len({id(layer.kv.rotation) for layer in cache.layers}) == 1
    assert cache.is_filled()
    assert not lr.LowRankCache().is_filled()


def state(cache):
    """What is stored, without the room for more, which nothing was written to."""
    found = {name: tensor.clone() for name, tensor in cache.tensors() if not name.endswith("tail")}
    return found | {(k, side): x for k, layer in enumerate(cache.layers) for side, x in enumerate(layer.kv.dense())}


def poisoned():
    net = model("llama", "lowrank", num_hidden_layers=4)
    with torch.no_grad():
        net.model.layers[2].self_attn.v_proj.weight[0, 0] = float("nan")
    return net


BAD = {
    "rank": (lambda: model("llama", "lowrank"), IDS, {"rank": 17}, "at most that many"),
    "too long": (lambda: model("llama", "lowrank"), IDS, {"max_length": 39}, "max_length=39"),
    "NaN": (poisoned, IDS, {}, "NaN or Inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_leaves_a_new_cache_new(name):
    lr.LowRankCache  # noqa: B018
    make, ids, changes, message = BAD[name]
    cache = exact(**changes)
    with torch.no_grad(), pytest.raises(lr.LowRankError, match=message):
        make()(ids, past_key_values=cache)
    assert (len(cache.layers), cache.get_seq_length(), cache.nbytes()) == (0, 0, 0)


USED = {
    "other heads": (lambda: model("llama", "lowrank", num_key_value_heads=4), IDS, "belongs to one"),
    "other size": (lambda: model("llama", "lowrank", head_dim=32), IDS, "belongs to one"),
    "other batch": (lambda: model("llama", "lowrank"), ONE, "belongs to one"),
    "more layers": (lambda: model("llama", "lowrank", num_hidden_layers=3), IDS, "belongs to one model"),
    "fewer layers": (lambda: model("llama", "lowrank", num_hidden_layers=1), IDS, "belongs to one model"),
    "other dtype": (lambda: model("llama", "lowrank").to(torch.bfloat16), IDS, "belongs to one"),
    "too long": (lambda: model("llama", "lowrank"), IDS.repeat(1, 3), "max_length=60"),
}


@pytest.mark.parametrize("name", USED)
def test_what_is_refused_leaves_a_used_cache_as_it_was(name, llamas):
    make, ids, message = USED[name]
    cache = exact(max_length=60)
    with torch.no_grad():
        llamas["lowrank"](IDS, past_key_values=cache)
        before = state(cache)
        with pytest.raises(lr.LowRankError, match=message):
            make()(ids, past_key_values=cache)
        after = state(cache)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        llamas["lowrank"](IDS[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 42


def test_a_fault_in_a_later_layer_is_taken_back_in_the_earlier_ones():
    lr.LowRankCache  # noqa: B018
    good, bad = model("llama", "lowrank", num_hidden_layers=4), poisoned()
    cache, plain = exact(), DynamicCache()
    with torch.no_grad():
        good(IDS, past_key_values=cache)
        with pytest.raises(lr.LowRankError, match="NaN or Inf"):
            bad(IDS[:, :1], past_key_values=cache)
        assert [len(layer) for layer in cache.layers] == [40] * 4
        good(IDS, past_key_values=plain)
        ours, theirs = (good(IDS[:, 5:8], past_key_values=c).logits for c in (cache, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_no_tokens_at_all():
    cache = exact()
    with pytest.raises(lr.LowRankError, match="not empty"):
        cache.update(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16), 0)
    with pytest.raises(lr.LowRankError, match="floating point"):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16).int(), 0)
    assert len(cache.layers) == 0


def test_files_that_are_torn_or_foreign(llamas, tmp_path):
    cache, path = exact(), tmp_path / "cache.safetensors"
    with torch.no_grad():
        llamas["lowrank"](IDS, past_key_values=cache)
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
    from safetensors import safe_open

    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for change in (
        lambda t: t.pop("0.keys.tail"),
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


def test_decoding_compiles_into_three_graphs():
    """The first step, a step at any length, and one that compresses."""
    lr.LowRankCache  # noqa: B018
    net, cache, plain, graphs = model("llama", "lowrank", num_hidden_layers=1), exact(), DynamicCache(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        for one in (cache, plain):
            net(ONE, past_key_values=one)
        decode = torch.compile(net.forward, fullgraph=True, backend=backend)
        for step in range(64):
            token = IDS[1:, step % 40 : step % 40 + 1]
            ours = decode(token, past_key_values=cache).logits
            theirs = net(token, past_key_values=plain).logits
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch._dynamo.reset()
    assert cache.layers[0].compressed > 80
    assert len(graphs) <= 3


@pytest.mark.parametrize("configured", [False, True])
def test_a_compiled_model_wants_a_prompt_first(llamas, monkeypatch, configured):
    cache = exact(config=llamas["lowrank"].config if configured else None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(lr.LowRankError, match="not compiled"):
        cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)


def test_without_transformers_the_extra_is_named():
    code = "import sys; sys.modules['transformers'] = None\n"
    code += "import lowrank_layers as lr\n"
    code += "assert 'LowRankCache' in dir(lr) and 'LowRankCache' in lr.__all__\n"
    code += "try: lr.LowRankCache\n"
    code += "except lr.MissingExtraError as error: assert 'lowrank-layers[transformers]' in str(error)\n"
    code += "else: raise SystemExit(1)"
    subprocess.run([sys.executable, "-c", code], check=True)
