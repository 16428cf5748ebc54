"""C++ that is compiled on first use: once, kept, and done without where that is impossible."""

from __future__ import annotations

import shutil
import sys

import pytest

from lowrank_layers.kv_cache.compiled import SWITCH, compiled

SOURCE = '#include "factor.h"\nextern "C" int times(int x) { return factor * x; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    folder = tmp_path / "functions"
    folder.mkdir()
    (folder / "factor.h").write_text("constexpr int factor = 2;\n")
    (folder / "times.cpp").write_text(SOURCE)
    compiled.cache_clear()
    yield folder
    compiled.cache_clear()


def _kept(folder):
    return sorted(path.name for path in (folder.parent / "kept").glob("**/*.*"))


def test_functions_are_compiled_once_and_kept(folder, monkeypatch):
    assert compiled(folder).times(21) == 42
    (name,) = _kept(folder)
    assert name.startswith("functions_")
    compiled.cache_clear()
    monkeypatch.setattr("subprocess.run", None)  # calling a compiler again would raise
    assert compiled(folder).times(4) == 8
    monkeypatch.undo()


def test_another_header_is_another_library(folder, monkeypatch):
    assert compiled(folder).times(1) == 2
    (folder / "factor.h").write_text("constexpr int factor = 3;\n")
    compiled.cache_clear()
    assert compiled(folder).times(1) == 3
    assert len(_kept(folder)) == 2


@pytest.mark.parametrize(("name", "value"), [(SWITCH, "0"), ("CXX", "/nowhere/c++")])
def test_nothing_is_compiled_where_it_is_switched_off_or_impossible(folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert compiled(folder) is None
    assert _kept(folder) == []


def test_what_does_not_compile_leaves_no_files(folder):
    (folder / "more.cpp").write_text("this is not C++")
    assert compiled(folder) is None
    assert _kept(folder) == []


def test_a_home_that_cannot_be_written_to(folder):
    (folder.parent / "kept").write_text("a file where the folder would be")
    assert compiled(folder).times(5) == 10
