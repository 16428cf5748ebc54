"""README's Python blocks run, and the table of layers is what the registry of methods says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision
from lowrank_layers.compress.method import factored_like
from lowrank_layers.layers import FACTORED_LAYERS, PROJECTIONS

from .contracts.tables import REFIT_RULES, RULES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def dense_of(cls: type[lr.FactoredModule]) -> nn.Module:
    """A small layer that ``cls`` stands in for."""
    if issubclass(cls, lr.LowRankTransposedLinear):
        return cls.blank(8, 8, "meta", torch.float32)
    sizes = (8, 8, 3) if "Conv" in cls.dense_type.__name__ else (8, 8)
    return cls.dense_type(*sizes, device="meta")


def table() -> str:
    """Dense layer, what replaces it, its children, and the method that does it."""
    rows: dict[str, list[str]] = {}
    public = [method for method in lr.METHODS.values() if hasattr(lr, type(method).__name__)]
    for method in public:
        for cls in method.layers:
            dense = dense_of(cls)
            rank = (2, 2) if cls in (*lr.TuckerMethod.layers, lr.TensorizedEmbedding) else 2
            layer = factored_like(method, dense, rank, bias=True)
            form = ", ".join(f'{key}="{value}"' for key, value in method.form.items())
            children = ", ".join(f"`{name}`" for name, _ in layer.named_children())
            name = f"`{cls.__name__}({form})`" if form else f"`{cls.__name__}`"
            rows.setdefault(cls.dense_name(), []).append(f"{name} | {children} | `{method.name}`")
    attention = ", ".join(f"`{name}`" for name in PROJECTIONS)
    rows["nn.MultiheadAttention"] = [f"`LowRankMultiheadAttention` | {attention}, each a layer | as `nn.Linear`"]
    lines = ["| dense | low-rank | children | method |", "|---|---|---|---|"]
    lines += [f"| {dense_cell(dense)} | {entry} |" for dense, entries in rows.items() for entry in entries]
    return "\n".join(lines)


def dense_cell(name: str) -> str:
    return f"`{name}`" if name.startswith("nn.") else name


def test_the_table_of_layers_is_the_registry():
    page = ROOT / "docs" / "layers.md"
    assert table() in page.read_text(encoding="utf-8"), f"the table in {page} has drifted; it should be\n\n{table()}"


def test_every_factored_layer_is_built_by_a_method():
    built = {cls for method in lr.METHODS.values() for cls in method.layers}
    assert built == set(FACTORED_LAYERS.values())


@pytest.mark.parametrize("page", ["README.md", "docs/ranks.md"])
def test_the_table_of_rank_rules_has_every_rule_of_the_contract_tables(page):
    rules = {type(row.rule).__name__ for row in (*RULES, *REFIT_RULES)} | {"ParameterFraction", "RankFraction"}
    text = (ROOT / page).read_text(encoding="utf-8")
    table = text[text.index("| rule | the rank | reads |") :].split("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(rules)


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs_as_it_stands(block, tmp_path, monkeypatch):
    import_torchvision()  # transformers imports it where it is installed
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
