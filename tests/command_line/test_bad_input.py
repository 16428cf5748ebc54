"""What cannot be used: one line that says why, exit code 2, and nothing written."""

import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file

from lowrank_layers.command_line import main

from .files import Small, write, write_sharded


class Evil:
    def __reduce__(self):
        return os.system, ("touch EVIL",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with good files and bad ones, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    model = Small()
    data = write(model, tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04half")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(model, tmp_path / "whole.pt")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    save_file({"other.weight": torch.ones(4, 4)}, "other.safetensors")
    save_file({"bias": torch.ones(4)}, "vector.safetensors")
    bad = {**model.state_dict(), "layers.up.weight": torch.full((40, 16), float("nan"))}
    save_file(bad, "nan.safetensors")
    save_file(
        {**model.state_dict(), "layers.up.weight": torch.ones(41, 16), "layers.up.bias": torch.ones(41)},
        "wider.safetensors",
    )
    sharded = write_sharded(model.state_dict(), tmp_path / "sharded")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "plan.json").write_text('{"format": "lowrank_layers.plan"')
    assert main(["plan", "good.safetensors", "good.json", "--rank=2", "--json"]) == 0
    return tmp_path


BAD = [
    ("inspect nowhere.safetensors", "no such file"),
    ("inspect torn.safetensors", "torn"),
    ("inspect text.safetensors", "torn or no safetensors file"),
    ("inspect torn.pt", "torn"),
    ("inspect evil.pt", "a pickle can run any code"),
    ("inspect whole.pt", "a pickle can run any code"),
    ("inspect numbers.pt", "expected a state dict"),
    ("inspect sharded", "no such file"),
    ("inspect empty", "no weights"),
    ("inspect vector.safetensors", "no weight of a linear layer"),
    ("inspect nan.safetensors", "layers.up.weight"),
    ("inspect good.safetensors --error=2", "got 2.0"),
    ("inspect good.safetensors --include=attention", "matches no layer"),
    ("inspect good.safetensors --include=(", "no regular expression"),
    ("spectrum nan.safetensors", "layers.up.weight"),
    ("spectrum vector.safetensors", "two or more dimensions"),
    ("plan good.safetensors out.json", "one of the arguments --rank --energy --budget is required"),
    ("plan good.safetensors out.json --rank=2 --budget=0.5", "not allowed with"),
    ("plan good.safetensors out.json --rank=0", "rank"),
    ("plan good.safetensors out.json --energy=7", "7.0"),
    ("plan good.safetensors out.json --budget=0.001", "Raise the budget"),
    ("plan good.safetensors out.json --budget=2.5", "expected a fraction"),
    ("plan good.safetensors out.json --budget=half", "invalid"),
    ("plan good.safetensors nowhere/out.json --rank=2", "does not exist"),
    ("apply good.safetensors out.safetensors --plan plan.json", "torn or not JSON"),
    ("apply other.safetensors out.safetensors --plan good.json", "no linear layer of"),
    ("apply wider.safetensors out.safetensors --plan good.json", "plan anew"),
    ("apply nan.safetensors out.safetensors --plan good.json", "layers.up.weight"),
    ("apply good.safetensors out.safetensors --plan good.json --include=up", "--plan beside --include"),
    ("apply good.safetensors out.safetensors --rank=2 --tied a=b", "NAME_IN_THE_FILE"),
    ("diff good.safetensors other.safetensors", "no name in common"),
    ("diff good.safetensors nan.safetensors", "layers.up.weight"),
    ("extract-lora good.safetensors torn.safetensors out --rank=2", "torn"),
    ("extract-lora good.safetensors other.safetensors out --rank=2", "--exclude it"),
    ("extract-lora good.safetensors wider.safetensors out --rank=2", "(41,)"),
    ("extract-lora good.safetensors nan.safetensors out --rank=2", "layers.up.weight"),
    ("extract-lora good.safetensors good.safetensors out --rank=2", "no linear layer changed"),
    ("extract-lora good.safetensors good.safetensors plan.json --rank=2", "cannot be a folder"),
    ("merge-lora good.safetensors empty out.safetensors", "there is no such file"),
    ("merge-lora good.safetensors other.safetensors out.safetensors", "other.safetensors"),
    ("merge-lora sharded empty sharded", "is not empty"),
    ("compress good.safetensors", "invalid choice"),
]


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_it_is_refused_in_one_line_and_nothing_is_written(folder, capsys, command, words):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert printed.out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_torn_file_is_refused_wherever_it_ends(tmp_path, capsys, kind):
    state = {"linear.weight": torch.ones(8, 8)}
    path = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    data = path.read_bytes()
    assert main(["spectrum", str(path), "--json"]) == 0
    for length in (0, 1, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        capsys.readouterr()
        assert main(["spectrum", str(path), "--json"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_tensors_that_cannot_be_written_again_are_refused(tmp_path, capsys):
    for tensor in (torch.ones(2, 2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.ones(2, 2, device="meta")):
        torch.save({"linear.weight": tensor}, tmp_path / "model.pt")
        assert main(["spectrum", str(tmp_path / "model.pt")]) == 2
        assert "linear.weight" in capsys.readouterr().err


def test_a_compressed_checkpoint_is_not_compressed_again(folder, capsys):
    assert main(["apply", "good.safetensors", "small.safetensors", "--rank=2"]) == 0
    assert main(["plan", "small.safetensors", "out.json", "--rank=1"]) == 2
    assert "factored already" in capsys.readouterr().err


def test_without_rich_the_error_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["diff", "good.safetensors", "wider.safetensors"]) == 2
    assert "lowrank-layers[cli]" in capsys.readouterr().err
    assert main(["diff", "good.safetensors", "wider.safetensors", "--json"]) == 0
