"""What is generated when the site is built: the reference, the benchmarks, outputs and pictures.

A page may contain these comments, which are replaced:

- ``<!-- table: THEME / HEADING -->``: a table of the latest benchmarks/results of this theme, with its source.
- ``<!-- picture: THEME -->``: the picture of these results (``pictures.py``).
- ``<!-- file: NAME -->``: a file of the repository's top, whose links are rewritten.

Python blocks are run (``snippets.py``), and what they print and draw is shown below them.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
from collections.abc import Callable
from typing import Any

import mathml
import matplotlib as mpl
import matplotlib.pyplot as plt
import names
import pictures
import reference
import results
import snippets
import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

from benchmarks.vision import import_torchvision

mpl.use("Agg")
torch.set_num_threads(1)  # the models of the pages are small
with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it where it is installed
FENCES_AND_CODE = re.compile(r"^```.*?^```$|(?<![`\[])`([^`\n]+)`(?![`\]])", re.M | re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Formulas in Markdown, and the menus of the generated pages."""
    formula = {"name": "math", "class": "math"}
    config.mdx_configs["pymdownx.inlinehilite"] = {"custom_inline": [formula | {"format": mathml.inline}]}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [formula | {"format": mathml.block}]}
    menus = {
        "Reference": list(reference.pages()),
        "Benchmarks": ["benchmarks/index.md", *map(address, results.files())],
    }
    for entry in config.nav or []:
        for title in entry.keys() & menus.keys():
            entry[title] = menus[title]
    return config


def address(path: Any) -> str:
    """The page of a file of results."""
    return f"benchmarks/{path.name}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are generated."""
    generated = reference.pages() | {address(path): results.page(path) for path in results.files()}
    for uri, text in generated.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Runs the blocks, fills in tables, pictures and files, and links public names."""
    here = page.file.src_uri
    theme = here.removeprefix("benchmarks/").partition("_cpu_")[0]
    if theme in pictures.PICTURES and results.newest(theme).name in here:
        markdown = markdown.rstrip() + f"\n\n<!-- picture: {theme} -->\n"
    if here.startswith(("reference/", "benchmarks/")):
        outputs = iter(())
    else:
        torch.manual_seed(0)
        outputs = iter(list(snippets.run(markdown, here)))

    def relative(uri: str) -> str:
        return posixpath.relpath(uri, posixpath.dirname(here) or ".")

    def image(name: str, draw: Callable[[], Any]) -> str:
        drawn = io.BytesIO()
        figure = draw()
        figure.savefig(drawn, format="svg", bbox_inches="tight")
        plt.close(figure)
        files.append(File.generated(config, f"pictures/{name}.svg", content=drawn.getvalue()))
        return relative(f"pictures/{name}.svg")

    def with_output(block: re.Match[str]) -> str:
        output = next(outputs, None)
        if output is None:
            return block[0]
        shown = block[0] + (f'\n\n```text title="prints"\n{output.text}\n```' if output.text else "")
        for figure in output.figures:
            name = f"{posixpath.splitext(here)[0].replace('/', '_')}_{block.start()}"
            shown += f"\n\n![what the code above draws]({image(name, lambda figure=figure: figure)})"
        return shown

    def table(comment: re.Match[str]) -> str:
        source = results.newest(comment[1])
        link = f"[benchmarks/results/{source.name}]({relative(address(source))})"
        return f"{results.table(comment[1], comment[2])}\n\n<small>Measured: {link}</small>"

    def picture(comment: re.Match[str]) -> str:
        shown = []
        for style, scheme in (("default", "light"), ("dark_background", "dark")):
            with plt.style.context(style):
                path = image(f"{comment[1]}_{scheme}", pictures.PICTURES[comment[1]])
            shown.append(f"![{pictures.PICTURES[comment[1]].__doc__}]({path}#only-{scheme})")
        return "".join(shown)

    def file(comment: re.Match[str]) -> str:
        text = (results.ROOT / comment[1]).read_text("utf-8")
        return re.sub(r"\]\(([^)#:]+)\)", lambda link: f"]({relative(inside(link[1]))})", text)

    markdown = snippets.BLOCK.sub(with_output, markdown)
    markdown = re.sub(r"^<!-- table: (\w+) / (.*) -->$", table, markdown, flags=re.M)
    markdown = re.sub(r"^<!-- picture: (\w+) -->$", picture, markdown, flags=re.M)
    markdown = re.sub(r"^<!-- file: ([\w.]+) -->$", file, markdown, flags=re.M)
    return FENCES_AND_CODE.sub(lambda found: names.linked(found[1]) if found[1] else found[0], markdown)


def inside(path: str) -> str:
    """Where the site has what a file at the top of the repository links to."""
    path = path.removeprefix("docs/").rstrip("/")
    if path.startswith("benchmarks/results"):
        path = path.replace("benchmarks/results", "benchmarks", 1) if path.endswith(".md") else "benchmarks/index.md"
    return path.lower() if "/" not in path else path


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Names the pages of the benchmarks by the script, since some share a headline."""
    for page in nav.pages:
        if page.file.src_uri.startswith("benchmarks/") and page.file.src_uri != "benchmarks/index.md":
            page.title = page.file.src_uri.removeprefix("benchmarks/").rpartition("_cpu_")[0]
    return nav
