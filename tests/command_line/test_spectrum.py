"""``lowrank inspect``, ``spectrum`` and ``diff`` print what the functions of the library find."""

import copy

import pytest
import torch
from safetensors.torch import save_file

import lowrank_layers as lr
from lowrank_layers.command_line import main

from .files import Small, low_rank, run_json, write, write_sharded


def test_spectrum_prints_the_spectra_of_the_model(tmp_path, capsys):
    model = Small()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "model.pt")
    printed = run_json(capsys, "spectrum", tmp_path / "model.pt")
    expected = lr.weight_spectrum(model)
    assert printed.keys() == {f"{layer.name}.weight" for layer in expected}
    for layer in expected:
        found = printed[f"{layer.name}.weight"]
        torch.testing.assert_close(torch.tensor(found["values"]).double(), layer.raw.values, rtol=1e-5, atol=1e-8)
        assert found["rank_for_energy"]["0.95"] == layer.raw.rank_for_energy(0.95)
        assert found["evbmf_rank"] == layer.raw.evbmf_rank


def test_inspect_prints_ranks_advice_and_forecasts(tmp_path, capsys):
    model = Small()
    with torch.no_grad():
        model.layers.up.weight.copy_(torch.randn(40, 2) @ torch.randn(2, 16))
    printed = run_json(capsys, "inspect", write_sharded(model.state_dict(), tmp_path / "m"), "--exclude=lm_head")
    spectra = lr.weight_spectrum(model)
    for name, layer in printed["layers"].items():
        assert layer["effective_rank"] == pytest.approx(spectra[name].raw.effective_rank, rel=1e-6)
        assert layer["factorize"] == bool(lr.should_factorize(model.get_submodule(name).weight))
    assert printed["layers"]["layers.up"]["factorize"]
    options = {"methods": [lr.SVDMethod()], "skip": ["embed_tokens", "lm_head"]}
    expected = lr.forecast(model, lr.Budget(params=0.75), **options)
    found = printed["forecast"]["0.75"]
    assert found["ranks"] == {entry.name: entry.rank for entry in expected.plan}
    assert found["removed"] == pytest.approx(expected.removed)
    assert found["ratio_times_stable_rank"] == pytest.approx(expected.ratio_times_stable_rank, rel=1e-6)
    assert printed["forecast"]["0.25"] is None  # embedding and head have more than that


def test_diff_says_what_changed_and_of_what_rank(tmp_path, capsys):
    base = Small()
    tuned = low_rank(copy.deepcopy(base), rank=2)
    state = tuned.state_dict()
    state["new"] = torch.ones(2)
    state["embed_tokens.weight"] = torch.randn(31, 16)
    save_file(state, tmp_path / "tuned.safetensors")
    printed = run_json(capsys, "diff", write(base, tmp_path / "base.safetensors"), tmp_path / "tuned.safetensors")
    assert printed["only"] == {"base": [], "tuned": ["new"]}
    assert printed["shapes"] == {"embed_tokens.weight": [[30, 16], [31, 16]]}
    assert printed["changed"].keys() == {f"{n}.weight" for n in ("layers.up", "layers.down", "layers.out", "lm_head")}
    for name, found in printed["changed"].items():
        change = (state[name] - base.state_dict()[name]).double()
        relative = change.norm() / base.state_dict()[name].double().norm()
        assert found["change"] == pytest.approx(float(relative), rel=1e-6)
        assert found["stable_rank"] == pytest.approx(lr.MatrixSpectrum.of(change).stable_rank, rel=1e-6)
        assert found["rank_99"] <= 2


@pytest.mark.parametrize("command", ["inspect", "spectrum", "diff"])
def test_tables_have_every_layer(tmp_path, capsys, command):
    path = str(write(Small(), tmp_path / "base.safetensors"))
    assert main([command, path, *([str(write(Small(), tmp_path / "other.safetensors"))] * (command == "diff"))]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("layers.up", "layers.down", "lm_head"))
