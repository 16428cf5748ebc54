"""What MkDocs calls when it builds the site: adds generated pages, runs blocks, fills in results, links names."""

from __future__ import annotations

import contextlib
import re

import mathml
import matplotlib as mpl
import names
import pictures
import reference
import results
import snippets
import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from page_parts import PageParts

from benchmarks.vision import import_torchvision

mpl.use("Agg")
torch.set_num_threads(1)  # the models of the pages are small
with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
PART = re.compile(r"^<!-- (\w+): ?(.*?) -->$", re.M)
FENCES_AND_CODE = re.compile(r"^```.*?^```$|(?<![`\[])`([^`\n]+)`(?![`\]])", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Formulas in Markdown, and the menus of the generated pages."""
    formula = {"name": "math", "class": "math"}
    config.mdx_configs["pymdownx.inlinehilite"] = {"custom_inline": [formula | {"format": mathml.inline}]}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [formula | {"format": mathml.block}]}
    of_results = [{results.theme(path): f"benchmarks/{path.name}"} for path in results.files()]
    menus = {"Reference": list(reference.pages()), "Benchmarks": ["benchmarks/index.md", *of_results]}
    for entry in config.nav or []:
        for title in entry.keys() & menus.keys():
            entry[title] = menus[title]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are generated."""
    generated = reference.pages()
    for path in results.files():
        latest = path == results.newest(results.theme(path)) and results.theme(path) in pictures.PICTURES
        picture = f"\n<!-- picture: {results.theme(path)} -->\n" if latest else ""
        generated[f"benchmarks/{path.name}"] = results.page(path) + picture
    for uri, text in generated.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Runs the blocks, fills in tables, pictures and files, and links public names."""
    parts = PageParts(page.file.src_uri, config, files)
    torch.manual_seed(0)
    outputs = iter(snippets.run(markdown, page.file.src_uri))
    markdown = snippets.BLOCK.sub(lambda block: block[0] + parts.output(next(outputs)), markdown)
    markdown = PART.sub(lambda comment: parts.kinds()[comment[1]](comment[2]), markdown)
    return FENCES_AND_CODE.sub(lambda found: names.linked(found[1]) if found[1] else found[0], markdown)
