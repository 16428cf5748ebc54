"""CONTRIBUTING.md is the map for newcomers: what it names is there, and every package is on it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PATHS = sorted(set(re.findall(r"`([\w./]+(?:\.py|\.md|\.cfg|/))`", TEXT)) - {"../shared/data"})


@pytest.mark.parametrize("path", PATHS)
def test_every_file_that_it_names_exists(path):
    assert (ROOT / path).exists() or (ROOT / "lowrank_layers" / path).exists()


def test_every_package_and_file_at_the_top_is_on_the_map():
    top = (ROOT / "lowrank_layers").iterdir()
    names = {f"{p.name}/" if p.is_dir() else p.name for p in top if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - {"__init__.py"} <= set(PATHS)
