"""The program itself: a process, help, completion."""

import subprocess
import sys

import pytest

from lowrank_layers.command_line import main
from lowrank_layers.command_line.main import COMMANDS

from .files import Small, write


def test_a_process_ends_with_the_exit_code():
    done = subprocess.run([sys.executable, "-m", "lowrank_layers", "diff", "a", "b"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "lowrank: a: there is no such file.\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"lowrank {command}" in printed.partition("examples:")[2]


def test_without_a_command_it_prints_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_completion_without_shtab_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "lowrank-layers[cli]" in capsys.readouterr().err


def test_a_terminal_shows_progress(tmp_path, capsys, monkeypatch):
    path = str(write(Small(), tmp_path / "model.safetensors"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["inspect", path, "--json"]) == 0
    assert "singular values" in capsys.readouterr().err
