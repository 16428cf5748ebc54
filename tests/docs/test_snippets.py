"""The Python blocks of docs/ run from top to bottom, page by page, as when the site is built."""

from pathlib import Path

import pytest
import torch

from benchmarks.vision import import_torchvision

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}


@pytest.fixture
def run(monkeypatch):
    """The function that runs the blocks of a page, with matplotlib not showing anything."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.syspath_prepend(DOCS / "hooks")
    import snippets

    import_torchvision()  # transformers imports it where it is installed
    return snippets.run


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_the_blocks_of_a_page_run(page, run):
    outputs = run(PAGES[page], page)
    assert len(outputs) == PAGES[page].count("```python")
    assert not torch.distributed.is_initialized()
