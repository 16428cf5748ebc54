"""docs/stability.md names every file format, with the version that the code writes."""

import ast
import re
from pathlib import Path

import lowrank_layers as lr

from .conftest import DOCS

PACKAGE = Path(lr.__file__).parent


def versions() -> dict[str, int]:
    """The constants ``VERSION`` of the package, by file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and [getattr(each, "id", "") for each in node.targets] == ["VERSION"]:
                found[path.relative_to(PACKAGE).as_posix()] = ast.literal_eval(node.value)
    return found


def test_the_tables_have_every_format():
    rows = re.findall(
        r"^\|.*\| (\d+) \| ([\d, ]+) \| `([\w/]+\.py)` \|$", (DOCS / "stability.md").read_text("utf-8"), re.M
    )
    assert {path: int(version) for version, _, path in rows} == versions()
    for version, read, path in rows:
        assert [int(each) for each in read.split(", ")] == list(range(1, int(version) + 1)), path
