import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_layers as lr
from lowrank_layers.checkpoint import KEY


def build():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 20)
    )


@pytest.fixture
def small():
    model = build().eval()
    data = [torch.randn(64, 3, 8, 8)]
    stats = lr.calibrate(model, data, loss=lr.SampledCrossEntropy())
    plan = lr.make_plan(model, lr.Budget(params=0.2), stats=stats)
    plan.set_rank("0", (5, 2), method="tucker")
    return lr.factorize_(model, plan, stats=stats, data=data)


@pytest.fixture
def path(small, tmp_path):
    lr.save(small, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_fresh_dense_model_becomes_the_saved_one(small, path):
    loaded = lr.load(path, into=build()).eval()
    x = torch.randn(5, 3, 8, 8)
    assert same_state(loaded, small)
    assert torch.equal(loaded(x), small(x))
    assert isinstance(loaded[0], lr.TuckerConv2d)
    assert loaded[0].bias is not None  # the dense layer has none; it corrects the mean


def test_nothing_but_the_file_is_left(path):
    assert [p.name for p in path.parent.iterdir()] == ["small.safetensors"]


def test_any_reader_of_safetensors_can_read_it(small, path):
    assert load_file(path).keys() == small.state_dict().keys()


def test_a_meta_model_is_filled(small, path):
    with torch.device("meta"):
        empty = build()
    loaded = lr.load(path, into=empty).eval()
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(x), small(x))


def test_loading_into_the_factored_model_itself(small, path):
    other = copy.deepcopy(small)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert same_state(lr.load(path, into=other), small)


def test_a_dense_model_goes_round_too(tmp_path):
    model = build()
    lr.save(model, tmp_path / "dense.safetensors")
    assert same_state(lr.load(tmp_path / "dense.safetensors", into=build()), model)


def test_tied_and_shared_are_stored_once_and_stay_shared(tmp_path):
    def tied():
        model = nn.ModuleDict(
            {"embed": nn.Embedding(30, 8), "a": nn.Linear(8, 8), "head": nn.Linear(8, 30, bias=False)}
        )
        model["head"].weight = model["embed"].weight
        model["b"] = model["a"]
        return model

    model = tied()
    lr.factorize_(model, lr.make_plan(model, rank=2))
    lr.save(model, tmp_path / "tied.safetensors")
    assert len(load_file(tmp_path / "tied.safetensors")) == 4
    loaded = lr.load(tmp_path / "tied.safetensors", into=tied())
    assert loaded["head"].weight is loaded["embed"].weight
    assert loaded["a"] is loaded["b"]
    assert same_state(loaded, model)


def test_half_precision(small, tmp_path):
    lr.save(small.to(torch.bfloat16), tmp_path / "half.safetensors")
    assert same_state(lr.load(tmp_path / "half.safetensors", into=build().to(torch.bfloat16)), small)


def metadata(path, change):
    """Rewrites the file with other metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        body = json.loads(file.metadata()[KEY])
    change(body)
    save_file(load_file(path), path, metadata={"format": "pt", KEY: json.dumps(body)})


def tensors(path, change):
    """Rewrites the file with other tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=kept)


def other_model():
    return nn.Sequential(nn.Linear(4, 4))


def wider():
    model = build()
    model[4] = nn.Linear(16 * 64, 21)
    return model


def strided():
    model = build()
    model[0] = nn.Conv2d(3, 16, 3, padding=1, stride=1, dilation=1, padding_mode="reflect", bias=False)
    return model


BAD_FILES = {
    "torn": (lambda p: p.write_bytes(p.read_bytes()[:-100]), build, "torn"),
    "torn header": (lambda p: p.write_bytes(p.read_bytes()[:40]), build, "torn"),
    "empty": (lambda p: p.write_bytes(b""), build, "torn"),
    "not safetensors": (lambda p: p.write_text("hello, this is text"), build, "torn"),
    "missing": (lambda p: p.unlink(), build, "no such file"),
    "foreign": (lambda p: save_file(load_file(p), p, metadata={"format": "pt"}), build, "was not written by"),
    "newer": (lambda p: metadata(p, lambda b: b.update(version=7)), build, "version 7"),
    "metadata torn": (lambda p: metadata(p, lambda b: b.pop("layers")), build, "damaged"),
    "attentions torn": (lambda p: metadata(p, lambda b: b.pop("unfused")), build, "damaged"),
    "shared torn": (lambda p: metadata(p, lambda b: b.update(shared=[])), build, "damaged in shared"),
    "form missing": (lambda p: metadata(p, lambda b: b["layers"]["4"].pop("form")), build, "'4'.*damaged"),
    "more in a layer": (lambda p: metadata(p, lambda b: b["layers"]["4"].update(more=1)), build, "'4'.*newer"),
    "open attention": (lambda p: metadata(p, lambda b: b["unfused"].append("1")), build, "'1'.*a BatchNorm2d there"),
    "attention nowhere": (lambda p: metadata(p, lambda b: b["unfused"].append("9")), build, "'9'.*no such module"),
    "unknown layer type": (lambda p: metadata(p, lambda b: b["layers"]["4"].update(type="Magic")), build, "'4'"),
    "rank missing": (lambda p: metadata(p, lambda b: b["layers"]["4"].pop("rank")), build, "'4'"),
    "rank wrong": (lambda p: metadata(p, lambda b: b["layers"]["4"].update(rank=1)), build, "shape"),
    "rank absurd": (lambda p: metadata(p, lambda b: b["layers"]["4"].update(rank=-3)), build, "'4'"),
    "tensor missing": (lambda p: tensors(p, lambda s: s.pop("1.running_mean")), build, r"missing '1\.running_mean'"),
    "tensor extra": (lambda p: tensors(p, lambda s: s.update(more=torch.ones(2))), build, "unknown 'more'"),
    "wrong shape": (lambda p: tensors(p, lambda s: s.update({"1.bias": torch.ones(3)})), build, r"1\.bias"),
    "wrong dtype": (lambda p: tensors(p, lambda s: s.update({"1.bias": torch.ones(16).half()})), build, "float16"),
    "nan": (lambda p: tensors(p, lambda s: s["1.bias"].fill_(float("nan"))), build, "NaN"),
    "another model": (lambda p: None, other_model, "another model"),
    "another width": (lambda p: None, wider, "out_features 20"),
    "another padding": (lambda p: None, strided, "padding_mode"),
    "another dtype": (lambda p: None, lambda: build().double(), "dtype"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_by_name_and_the_model_is_untouched(path, case):
    spoil, make, message = BAD_FILES[case]
    spoil(path)
    model = make()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(lr.CheckpointError, match=message) as caught:
        lr.load(path, into=model)
    assert "small.safetensors" in str(caught.value)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Counted(nn.Sequential):
    """Counts how often its modules are walked over."""

    walks = 0

    def named_modules(self, *args, **kwargs):
        Counted.walks += 1
        return super().named_modules(*args, **kwargs)


def test_loading_walks_over_a_deep_model_as_often_as_over_a_flat_one(tmp_path):
    def build(depth: int) -> nn.Module:
        return Counted(*[nn.TransformerEncoderLayer(8, 2, 8) for _ in range(depth)])

    walks = []
    for depth in (1, 12):
        model = build(depth)
        lr.factorize_(model, lr.make_plan(model, rank=2))
        lr.save(model, tmp_path / "deep.safetensors")
        fresh, Counted.walks = build(depth), 0
        lr.load(tmp_path / "deep.safetensors", into=fresh)
        walks.append(Counted.walks)
        assert same_state(fresh, model)
    assert walks[0] == walks[1]


def test_a_failed_save_leaves_the_old_file(small, path, monkeypatch):
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("lowrank_layers.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lr.save(small, path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1
