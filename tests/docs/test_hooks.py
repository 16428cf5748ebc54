"""What is generated for the site: the reference, links to public names, tables and pictures of results."""

import re

import pytest

import lowrank_layers as lr
from lowrank_layers import interop, plot

from .conftest import DOCS

TEXT = "\n".join(path.read_text("utf-8") for path in DOCS.rglob("*.md"))
PARTS = sorted(set(re.findall(r"^<!-- (\w+): ?(.*?) -->$", TEXT, re.M)))


def test_the_reference_has_every_public_name_in_the_overview_and_in_full(hook):
    overview, *pages = hook("reference").pages().values()
    calls = [f"lr.{name}" for name in lr.__all__]
    calls += [f"plot.{name}" for name in vars(plot) if callable(getattr(plot, name)) and name[0] != "_"]
    calls += [f"interop.{name}" for name in vars(interop) if callable(getattr(interop, name)) and name[0] != "_"]
    for call in calls:
        row = re.search(rf"^\| \[`{re.escape(call)}`\]\[(\S+)\] \| (.*) \|$", overview, re.M)
        assert row, call
        assert row[2], f"{call} has no docstring"
        assert sum(f"\n::: {row[1]}\n" in f"{page}\n" for page in pages) == 1


@pytest.mark.parametrize(
    ("code", "path"),
    [
        ("lr.svd(m, 3)", "lowrank_layers.decompose.svd.svd"),
        ("make_plan(model, rank=2)", "lowrank_layers.compress.make_plan.make_plan"),
        ("Budget", "lowrank_layers.rank.budget.Budget"),
        ("plot.losses", "lowrank_layers.plot.curves.losses"),
        ("svd", None),  # a method, and a word
        ("plan.set_rank('fc', 2)", None),
        ("compress/plan.py", None),
    ],
)
def test_code_that_names_something_public_is_linked(code, path, hook):
    assert hook("names").linked(code) == (f"[`{code}`][{path}]" if path else f"`{code}`")


def test_roles_of_docstrings_become_formulas_and_links(hook):
    text = ":math:`x^2`, :func:`svd`, :class:`~lowrank_layers.rank.Budget`, :meth:`to_json`, ``Budget``, ``None``"
    svd, budget = "lowrank_layers.decompose.svd.svd", "lowrank_layers.rank.budget.Budget"
    markdown = f"`#!math x^2`, [`svd`][{svd}], [`Budget`][{budget}], `to_json`, [`Budget`][{budget}], `None`"
    assert hook("names").without_roles(text) == markdown


@pytest.mark.parametrize("argument", [argument for kind, argument in PARTS if kind == "table"])
def test_tables_of_results_that_pages_show_exist(argument, hook):
    theme, _, heading = argument.partition(" / ")
    assert hook("results").table(theme, heading).count("\n") >= 2


def test_every_picture_of_results_is_drawn(hook):
    pictures = hook("pictures").PICTURES
    assert {argument for kind, argument in PARTS if kind == "picture"} <= set(pictures)
    for draw in pictures.values():
        assert draw().axes[0].has_data()
        hook("snippets").taken_figures()


def test_the_benchmark_of_every_file_of_results_is_known(hook):
    results = hook("results")
    scripts = {path.name: results.script(path) for path in results.files()}
    assert all(name.startswith(f"{script}_") for name, script in scripts.items())
    assert scripts["ddp_convergence_small_cpu_202611.md"] == "ddp_convergence"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:examples|tests|docs|benchmarks)/[\w./]*)`", TEXT))))
def test_files_that_the_pages_name_exist(path):
    assert (DOCS.parent / path).exists()
