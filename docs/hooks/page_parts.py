"""What a page is filled with: outputs of its blocks, tables and pictures of results, files of the repository."""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import results
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pictures import PICTURES
from snippets import Output


class PageParts:
    """Parts of one page as Markdown, with links relative to it; pictures become files of the site.

    Args:
        page: the page's path in the site, as Markdown.
        config: the site's configuration.
        files: the site's files.
    """

    def __init__(self, page: str, config: MkDocsConfig, files: Files) -> None:
        self.page = page
        self.config = config
        self.files = files
        self.drawn = 0

    def kinds(self) -> dict[str, Callable[[str], str]]:
        """What ``<!-- KIND: ARGUMENT -->`` in a page is replaced by."""
        parts = (self.table, self.picture, self.results, self.examples, self.file)
        return {part.__name__: part for part in parts}

    def output(self, output: Output) -> str:
        """What a block has printed and drawn."""
        text = f'\n\n``` {{ .text .no-copy title="prints" }}\n{output.text}\n```' if output.text else ""
        name = posixpath.splitext(self.page)[0].replace("/", "_")
        return text + "".join(f"\n\n![what the code above draws]({self._image(name, each)})" for each in output.figures)

    def table(self, argument: str) -> str:
        """A table of the latest results of a theme: ``THEME / HEADING``, or ``THEME`` for the first one."""
        theme, _, heading = argument.partition(" / ")
        source = results.newest(theme)
        link = f"[benchmarks/results/{source.name}]({self._relative(f'benchmarks/{source.name}')})"
        return f"{results.table(theme, heading)}\n\n<small>Measured: {link}</small>"

    def picture(self, theme: str) -> str:
        """The picture of the latest results of a theme, light and dark."""
        images = []
        for style, scheme in (("default", "light"), ("dark_background", "dark")):
            with plt.style.context(style):
                images.append(f"![{PICTURES[theme].__doc__}]({self._image(theme, PICTURES[theme]())}#only-{scheme})")
        return "".join(images)

    def results(self, argument: str) -> str:
        """All files of results."""
        return results.index()

    def examples(self, argument: str) -> str:
        """The scripts in examples/, and the first sentences of their docstrings."""
        texts = {path: path.read_text("utf-8") for path in sorted((results.ROOT / "examples").glob("*.py"))}
        scripts = {path.name: text for path, text in texts.items() if "__main__" in text}
        rows = [f"| `{name}` | {text.splitlines()[0][3:]} |" for name, text in scripts.items()]
        return "\n".join(["| examples/ | |", "|---|---|", *rows])

    def file(self, name: str) -> str:
        """A file at the top of the repository, whose links lead into the site."""
        text = (results.ROOT / name).read_text("utf-8")
        return re.sub(r"\]\(([^)#:]+)\)", lambda link: f"]({self._relative(_in_site(link[1]))})", text)

    def _relative(self, path: str) -> str:
        return posixpath.relpath(path, posixpath.dirname(self.page) or ".")

    def _image(self, name: str, figure: Any) -> str:
        content = io.BytesIO()
        figure.savefig(content, format="svg", bbox_inches="tight", transparent=True)
        plt.close(figure)
        self.drawn += 1
        path = f"pictures/{posixpath.basename(self.page)[:-3]}_{name}_{self.drawn}.svg"
        self.files.append(File.generated(self.config, path, content=content.getvalue()))
        return self._relative(path)


def _in_site(path: str) -> str:
    """Where the site has what a file at the top of the repository links to."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("benchmarks/results"):
        return path.replace("benchmarks/results", "benchmarks") if path.endswith(".md") else "benchmarks/index.md"
    return path.lower()
