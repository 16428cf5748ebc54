"""The reference: one page per package, with every public name of it."""

from itertools import groupby

from names import Name, public_names, without_roles

TITLES = {
    "layers": "Layers",
    "decompose": "Decompositions",
    "factors": "Factorizations",
    "rank": "Ranks and budgets",
    "calibrate": "Calibration",
    "compress": "Compression",
    "checkpoint": "Saving and loading",
    "lora": "LoRA",
    "kv_cache": "Key/value caches",
    "distributed": "Gradients between processes",
    "optim": "Optimizers",
    "spectrum": "Spectra",
    "plot": "Pictures",
    "interop": "Other libraries",
    "cost": "Costs",
    "errors": "Errors",
}
"""The packages in the order of the menu, and their titles; a package without a title fails the build."""


def pages() -> dict[str, str]:
    """The reference as Markdown, by path."""
    names = sorted(public_names().values(), key=lambda name: (list(TITLES).index(name.package), name.path))
    groups = {package: list(each) for package, each in groupby(names, lambda name: name.package)}
    found = {f"reference/{package}.md": page(TITLES[package], each) for package, each in groups.items()}
    sections = [f"## [{TITLES[package]}]({package}.md)\n\n{table(each)}" for package, each in groups.items()]
    head = "# Reference\n\nEvery public name, by package. `lr` is `lowrank_layers`.\n\n"
    return {"reference/index.md": head + "\n\n".join(sections)} | found


def page(title: str, names: list[Name]) -> str:
    """The page of a package: what it has, and then each name in full."""
    blocks = [f"::: {name.path}" for name in names]
    return f"# {title}\n\n{table(names)}\n\n" + "\n\n".join(blocks)


def table(names: list[Name]) -> str:
    """Names with their first sentences."""
    rows = [f"| [`{name.call}`][{name.path}] | {without_roles(name.summary)} |" for name in names]
    return "\n".join(["| name | |", "|---|---|", *rows])
