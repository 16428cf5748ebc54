"""C++ that is compiled on first use: once, kept, and done without where that is impossible."""

from __future__ import annotations

import shutil
import sys

import pytest

from lowrank_layers.kv_cache.compiled import SWITCH, compiled

SOURCE = 'extern "C" int twice(int x) { return 2 * x; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    if shutil.which("c++") is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    path = tmp_path / "functions.cpp"
    path.write_text(SOURCE)
    compiled.cache_clear()
    yield path
    compiled.cache_clear()


def _kept(source):
    return sorted(path.name for path in (source.parent / "kept").glob("**/*.*"))


def test_functions_are_compiled_once_and_kept_by_their_source(source, monkeypatch):
    assert compiled(source).twice(21) == 42
    (name,) = _kept(source)
    assert name.startswith("functions_")
    compiled.cache_clear()
    monkeypatch.setattr("subprocess.run", None)  # calling a compiler again would raise
    assert compiled(source).twice(4) == 8
    monkeypatch.undo()


def test_another_source_is_another_library(source, monkeypatch):
    assert compiled(source).twice(1) == 2
    source.write_text(SOURCE.replace("2 * x", "2 * x + 1"))
    compiled.cache_clear()
    assert compiled(source).twice(1) == 3
    assert len(_kept(source)) == 2


@pytest.mark.parametrize(("name", "value"), [(SWITCH, "0"), ("CXX", "/nowhere/c++")])
def test_nothing_is_compiled_where_it_is_switched_off_or_impossible(source, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert compiled(source) is None
    assert _kept(source) == []


def test_what_does_not_compile_leaves_no_files(source):
    source.write_text("this is not C++")
    assert compiled(source) is None
    assert _kept(source) == []


def test_a_home_that_cannot_be_written_to(source):
    (source.parent / "kept").write_text("a file where the folder would be")
    assert compiled(source).twice(5) == 10
