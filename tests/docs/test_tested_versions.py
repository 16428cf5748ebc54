"""The versions that docs/transformers.md names are those that the tests run with."""

import re

from benchmarks.transformers_versions import VERSIONS

from .conftest import DOCS

PINNED = dict(re.findall(r"^(\S+)==(\S+)$", (DOCS.parent / "constraints.txt").read_text("utf-8"), re.M))
TABLE = (DOCS / "transformers.md").read_text("utf-8").partition("## What was tested")[2].partition("\n## ")[0]


def test_the_versions_are_those_of_the_constraints():
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([\d., ]+) \|", TABLE, re.M))
    assert tuple(rows["transformers"].split(", ")) == VERSIONS
    named = {name: versions.split(", ")[-1] for name, versions in rows.items()}
    assert {"accelerate", "peft", "torchao", "onnxruntime", "gguf"} <= named.keys() & PINNED.keys()
    for name in named.keys() & PINNED.keys():
        assert named[name] == PINNED[name]
