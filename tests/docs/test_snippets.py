"""The Python blocks of docs/ and its calls of `lowrank` run, page by page, as when the site is built."""

import re

import pytest
import torch

from .conftest import DOCS

PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_the_blocks_of_a_page_run(page, hook):
    outputs = hook("snippets").run(PAGES[page], page)
    assert len(outputs) == len(re.findall("^```(?:python|console)$", PAGES[page], re.M))
    assert not torch.distributed.is_initialized()
