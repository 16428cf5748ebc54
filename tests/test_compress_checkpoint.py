"""From a folder of weights to a compressed one: what the functions in memory give, whatever kills the run."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers import files
from lowrank_layers.checkpoint import compress as module, run_folder, write_model
from lowrank_layers.compress.registry import usual_methods
from lowrank_layers.linalg import in_fp32

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers")

BUDGET = lr.Budget(params=0.6)


def tiny_llama(tied: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tokens() -> list[Tensor]:
    return list(torch.randint(61, (6, 30), generator=torch.Generator().manual_seed(1)).split(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of transformers in several files."""
    path = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


def in_memory(model: nn.Module) -> tuple[lr.Plan, nn.Module]:
    stats = lr.calibrate(model, tokens(), lr.SampledCrossEntropy())
    plan = lr.make_plan(model, BUDGET, stats, usual_methods(), skip=["lm_head"])
    return plan, lr.factorize_(copy.deepcopy(model), plan, stats, tokens())


def test_the_folder_holds_what_the_functions_in_memory_give(folder, tmp_path):
    plan = lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())
    expected_plan, expected = in_memory(tiny_llama())
    assert {entry.name: entry.rank for entry in plan} == {entry.name: entry.rank for entry in expected_plan}
    assert plan == lr.Plan.load(tmp_path / "small" / "plan.json")
    assert plan.after.params <= 0.6 * plan.total.params
    loaded = lr.load(tmp_path / "small", into=tiny_llama())
    x = tokens()[0]
    torch.testing.assert_close(loaded(x).logits, expected(x).logits, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "small" / run_folder.WORK).exists()
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == "llama"
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(by_transformers(x).logits, loaded(x).logits)
    assert by_transformers.lm_head.weight is by_transformers.model.embed_tokens.weight


WITH_UNITS = [*lr.METHODS.values(), lr.HiddenUnitsMethod()]


def test_hidden_units_are_removed_in_the_folder_as_in_memory(folder, tmp_path):
    plan = lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens(), methods=WITH_UNITS)
    model = tiny_llama()
    stats = lr.calibrate(model, tokens(), lr.SampledCrossEntropy())
    expected_plan = lr.make_plan(model, BUDGET, stats, WITH_UNITS, skip=["lm_head"])
    assert any(entry.is_grouped for entry in plan)
    assert {e.name: (e.method, e.rank) for e in plan} == {e.name: (e.method, e.rank) for e in expected_plan}
    expected, x = lr.factorize_(copy.deepcopy(model), expected_plan, stats, tokens()), tokens()[0]
    loaded = lr.load(tmp_path / "small", into=tiny_llama())
    sizes = [block.mlp.down_proj.in_features for block in loaded.model.layers]
    assert sizes == [block.mlp.down_proj.in_features for block in expected.model.layers]
    assert min(sizes) < 40
    torch.testing.assert_close(loaded(x).logits, expected(x).logits, rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in loaded.parameters()) == plan.after.params
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(by_transformers(x).logits, loaded(x).logits)


def test_a_run_with_hidden_units_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    """Those that stay are in a file: the run that goes on does not choose them again."""
    whole, broken, keep = tmp_path / "whole", tmp_path / "broken", module.LayerStore.keep
    lr.compress_checkpoint(folder, whole, BUDGET, tokens(), methods=WITH_UNITS)
    count = [0]

    def stops(self, name, look, make):
        count[0] += 1
        if count[0] == 15:
            raise KeyboardInterrupt
        return keep(self, name, look, make)

    monkeypatch.setattr(module.LayerStore, "keep", stops)
    with pytest.raises(KeyboardInterrupt):
        lr.compress_checkpoint(folder, broken, BUDGET, tokens(), methods=WITH_UNITS)
    monkeypatch.setattr(module.LayerStore, "keep", keep)
    monkeypatch.setattr(module, "kept_units", lambda *_: pytest.fail("chosen again"))
    lr.compress_checkpoint(folder, broken, BUDGET, tokens(), methods=WITH_UNITS)
    assert digest(broken) == digest(whole)


@pytest.mark.parametrize("slow", [False, True])
def test_products_are_those_of_fp32_in_all_passes_where_half_precision_is_slow(slow, tmp_path, monkeypatch):
    seen = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(in_fp32())
            return x.tanh()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(24, 24), Looks(), nn.Linear(24, 8)).bfloat16()

    lr.save(make(), tmp_path / "dense.safetensors")
    monkeypatch.setattr(module, "halves_are_slow", lambda: slow)
    batches = [torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).bfloat16()]
    lr.compress_checkpoint(tmp_path / "dense.safetensors", tmp_path / "small", BUDGET, batches, model=make().to("meta"))
    assert seen == [slow] * len(seen)
    assert len(seen) > 3
    assert not in_fp32()


def test_layers_of_a_folder_can_be_measured(folder, tmp_path):
    plan = lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens(), units="measured")
    model = tiny_llama()
    stats = lr.calibrate(model, tokens(), lr.SampledCrossEntropy())
    expected = lr.make_plan(model, BUDGET, stats, usual_methods(), skip=["lm_head"], batches=tokens())
    assert plan.settings["units"] == "measured"
    assert plan.loss == pytest.approx(expected.loss, rel=1e-2)
    assert all(
        abs((entry.rank or 0) - (expected[entry.name].rank or 0)) <= 1 for entry in plan
    )  # moments in float32 break ties


def test_layers_that_stay_dense_are_refitted_in_the_folder_too(folder, tmp_path, monkeypatch):
    def keeps_some(model: nn.Module, *args: object, **settings: object) -> lr.Plan:
        plan = lr.make_plan(model, *args, **settings)
        return plan.drop("model.layers.1.mlp.up_proj").drop("model.layers.2.self_attn.o_proj")

    monkeypatch.setattr(module, "make_plan", keeps_some)
    lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())
    loaded, dense = lr.load(tmp_path / "small", into=tiny_llama()), tiny_llama()
    up, own = loaded.model.layers[1].mlp.up_proj, dense.model.layers[1].mlp.up_proj
    assert type(up) is nn.Linear
    with torch.no_grad():
        assert 1e-3 < float((up.weight - own.weight).norm() / own.weight.norm()) < 1


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("shard", [1 << 30, 20_000])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(write_model, "SHARD", shard)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    lr.compress_checkpoint(folder, whole, BUDGET, tokens())
    own = {"keep": module.LayerStore.keep, "write": files.write_streamed, "plan": lr.Plan.save}
    left = [0]

    class Stopped(Exception):
        pass

    def stops(function):
        def counted(*args, **settings):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return function(*args, **settings)

        return counted

    monkeypatch.setattr(module.LayerStore, "keep", stops(own["keep"]))
    monkeypatch.setattr(files, "write_streamed", stops(own["write"]))
    monkeypatch.setattr(lr.Plan, "save", stops(own["plan"]))
    for left[0] in (0, 1, 9, 15, 21, 22):  # the plan, 21 layers, the plan, the files
        with pytest.raises(Stopped):
            lr.compress_checkpoint(folder, broken, BUDGET, tokens())
        assert not (broken / "model.safetensors.index.json").exists()
    left[0] = 1000
    lr.compress_checkpoint(folder, broken, BUDGET, tokens())
    assert digest(broken) == digest(whole)


def test_a_run_that_stops_when_all_is_written_is_not_lost(folder, tmp_path, monkeypatch):
    """It removes its own files last, one after the other."""
    own, left = run_folder._remove, [0]
    plan = lr.compress_checkpoint(folder, tmp_path / "whole", BUDGET, tokens())

    def stops(path: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        own(path)

    for count in range(4):  # the plan, the moments, the layers, and the folder of the run
        left[0] = count
        monkeypatch.setattr(run_folder, "_remove", stops)
        with pytest.raises(KeyboardInterrupt):
            lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())
        monkeypatch.setattr(run_folder, "_remove", own)
    assert str(lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())) == str(plan)
    assert not (tmp_path / "small" / run_folder.WORK).exists()
    assert digest(tmp_path / "small") == digest(tmp_path / "whole")


def test_a_run_that_stopped_before_it_had_begun_is_none(folder, tmp_path):
    work = tmp_path / "small" / run_folder.WORK
    work.mkdir(parents=True)
    (work / "arguments.json.tmp").write_text("{")
    lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())
    assert not work.exists()


SCRIPT = """
    import contextlib, os, random, signal, sys, time, torch, lowrank_layers as lr
    from benchmarks.vision import import_torchvision
    with contextlib.suppress(ImportError):
        import_torchvision()
    import transformers.models.llama.modeling_llama
    torch.set_num_threads(1)
    source, folder = sys.argv[1:]

    def started(target):
        child = os.fork()
        if not child:
            tokens = torch.randint(61, (6, 30), generator=torch.Generator().manual_seed(1)).split(2)
            lr.compress_checkpoint(source, target, lr.Budget(params=0.6), list(tokens))
            os._exit(0)
        return child

    def ended(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    begin = time.perf_counter()
    assert ended(started(folder + "/whole")) == 0
    takes = time.perf_counter() - begin
    random.seed(0)
    killed = complete = 0
    while killed < 10:
        child = started(f"{folder}/{complete}")
        time.sleep(random.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL), code
        killed, complete = killed + (code != 0), complete + (code == 0)
    assert ended(started(f"{folder}/{complete}")) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_processes_that_are_killed_are_resumed_to_the_same_bytes(folder, tmp_path):
    """SIGKILL at random moments, ten times, and each time the next process goes on."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "made").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, script, str(folder), str(tmp_path / "made")], env=env, check=True)
    whole, *others = sorted((tmp_path / "made").iterdir(), reverse=True)
    assert whole.name == "whole"
    assert others
    for each in others:
        assert digest(each) == digest(whole)


def test_other_arguments_do_not_go_on_with_a_run(folder, tmp_path, monkeypatch):
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "build_in_sequence", stops)
    with pytest.raises(KeyboardInterrupt):
        lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())
    before = digest(tmp_path / "small" / run_folder.WORK)
    for budget, batches in ((lr.Budget(params=0.5), tokens()), (BUDGET, tokens()[:2])):
        with pytest.raises(lr.CheckpointError, match="a run with other weights, batches or settings"):
            lr.compress_checkpoint(folder, tmp_path / "small", budget, batches)
    assert digest(tmp_path / "small" / run_folder.WORK) == before


def test_what_cannot_work_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(lr.CheckpointError, match="is not empty"):
        lr.compress_checkpoint(folder, tmp_path / "full", BUDGET, tokens())
    with pytest.raises(lr.LowRankError, match="no batches"):
        lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, [])
    with pytest.raises(lr.LowRankError, match="takes several layers at once"):
        lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens(), methods=[lr.AttentionHeadsMethod()])
    with pytest.raises(lr.CheckpointError, match=r"config\.json"):
        lr.compress_checkpoint(next(folder.glob("*.safetensors")), tmp_path / "small", BUDGET, tokens())
    with pytest.raises(lr.LowRankError, match="has values; build the model on the meta device"):
        lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens(), model=tiny_llama())
    with torch.device("meta"):
        other = nn.Linear(3, 3)
    with pytest.raises(lr.CheckpointError, match="does not fit the model: missing 'weight'"):
        lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens(), model=other)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(lr.CheckpointError, match="GiB free"):
        lr.compress_checkpoint(folder, tmp_path / "small", BUDGET, tokens())
    assert not (tmp_path / "small").exists()


def test_a_model_of_its_own_in_half_precision(tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 10))

    dense = build()
    dense[1].running_mean.normal_()
    dense = dense.bfloat16().eval()
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    with torch.device("meta"):
        model = build()
    model[1].running_mean, model[1].running_var = torch.zeros(12), torch.zeros(12)
    model[1].num_batches_tracked = torch.tensor(0)
    x = torch.randn(20, 3, 8, 8).bfloat16()
    lr.compress_checkpoint(tmp_path / "dense.safetensors", tmp_path / "small", lr.Budget(params=0.9), [x], model=model)
    loaded = lr.load(tmp_path / "small", into=build().bfloat16()).eval()
    assert torch.equal(loaded[1].running_mean, dense[1].running_mean)
    assert type(loaded[4]) is not nn.Linear
    with torch.no_grad():
        assert float((loaded(x) - dense(x)).norm() / dense(x).norm()) < 0.2
