"""What a public docstring or README names exists and runs: every call, every keyword, every rank rule.

A promise is code between backticks. A call of this library is bound to the signature of what it names and, where its
arguments are known below, run. A keyword on its own (``init="eva"``) is one that the documented callable takes.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMULAS = {"U", "tanh", "P", "E"}
"""Names that stand before a parenthesis in a formula and are no functions of torch or this library."""
FOREIGN = {"is_causal", "lora_unet_", "lora_te_"}
"""Keywords of transformers' models and prefixes in kohya's files."""
KEYWORD = re.compile(r"\w+=(?!=)")
"""By habit, ``init="eva"`` is a keyword and ``b = m / n`` a formula."""
SPAN = re.compile(r"``([^`]+)``|(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Promise:
    """Code in a text, and the callable that the text documents (``None`` for README)."""

    where: str
    code: str
    owner: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.code}"


def public_callables() -> Iterator[tuple[str, Any]]:
    """Every function, class and method of the package whose path has no private part."""
    with contextlib.suppress(ImportError):
        import_torchvision()  # transformers imports it where it is installed
    for info in pkgutil.walk_packages(lr.__path__, "lowrank_layers."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    method = getattr(member, "fget", None) or getattr(member, "__func__", member)
                    if not key.startswith("_") and inspect.isfunction(method):
                        yield f"{module.__name__}.{name}.{key}", method


def promises() -> list[Promise]:
    found = []
    for where, value in public_callables():
        for double, single in SPAN.findall(inspect.getdoc(value) or "") if value.__doc__ else ():
            found.append(Promise(where, " ".join((double or single).split()), value))
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    found += [Promise("README", double or single, None) for double, single in SPAN.findall(prose)]
    return [promise for promise in found if "(" in promise.code or KEYWORD.match(promise.code)]


PROMISES = promises()
CALLABLES = dict(public_callables())


def parsed(code: str) -> ast.Expression | None:
    """The code as an expression; keywords on their own as those of a call of ``_``."""
    code = re.sub(r"=(?=[,)]|$)", "=...", code)  # `rank=` and `Budget(bytes=)` name a keyword without a value
    for text in (f"_({code})" if KEYWORD.match(code) else code,):
        with contextlib.suppress(SyntaxError):
            return ast.parse(text, mode="eval")
    return None


def resolve(node: ast.expr, owner: Any) -> Any:
    """What a dotted name of this library or torch stands for; ``None`` if it is a local variable's."""
    *path, name = ast.unparse(node).split(".")
    module = inspect.getmodule(owner)
    scopes = [vars(lr) | {key: getattr(lr, key) for key in lr.__all__}, vars(module) if module else {}]
    scopes += [vars(nn), vars(math), vars(builtins), {"lr": lr, "torch": torch, "nn": nn, "F": nn.functional}]
    value: Any = None
    for part in (*path, name):
        if value is not None:
            value = getattr(value, part)  # an attribute that is promised and missing is a failure
        else:
            value = next((scope[part] for scope in scopes if part in scope), None)
        if value is None:
            return None
    return value


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def takes(function: Any, keyword: str) -> bool:
    found = parameters(function)
    return keyword in found or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values())


def check_call(call: ast.Call, promise: Promise) -> None:
    """The call names something real, and its arguments fit the signature."""
    keywords = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    if ast.unparse(call.func) == "_":  # keywords on their own
        if not call.args:
            everywhere = (
                [value for _, value in CALLABLES.items()] if promise.owner is None else relatives(promise.owner)
            )
            for keyword in set(keywords) - FOREIGN:
                assert any(takes(function, keyword) for function in everywhere), f"nothing takes {keyword}= here"
        return
    function = resolve(call.func, promise.owner)
    if function is None:
        name = ast.unparse(call.func)
        local = "." in name or name in FORMULAS or name in parameters(promise.owner)
        assert local or not re.fullmatch(r"[a-z]\w*_|(lora|low_rank|LowRank)\w*", name), f"{name} does not exist"
        return
    if inspect.getmodule(function) is not None and not any(isinstance(arg, ast.Starred) for arg in call.args):
        with contextlib.suppress(ValueError):  # torch's own functions without a signature
            inspect.signature(function).bind_partial(*call.args, **dict.fromkeys(keywords))


def relatives(owner: Any) -> list[Any]:
    """The documented callable, its class, what its text names, and its neighbours in the same file."""
    path = owner.__qualname__.rpartition(".")[0]
    module = inspect.getmodule(owner)
    named = [getattr(lr, key) for key in re.findall(r"\w+", inspect.getdoc(owner) or "") if key in lr.__all__]
    parent = [resolve(ast.parse(path, mode="eval").body, owner)] if path else []
    neighbours = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    return [value for value in (owner, *parent, *named, *neighbours) if callable(value)]


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_named_calls_and_keywords_exist(promise):
    tree = parsed(promise.code)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Call):
            check_call(node, promise)


def fenced_calls() -> list[ast.Call]:
    """The calls in README's blocks that need another library or other processes, and are not run by the tests."""
    blocks = re.findall(r"```py\n(.*?)```", README, flags=re.S)
    return [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("call", fenced_calls(), ids=ast.unparse)
def test_calls_of_the_blocks_that_are_not_run_exist(call):
    check_call(call, Promise("README", ast.unparse(call), None))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def adapted() -> nn.Module:
    return lr.add_lora_(small(), rank=2)


MAKERS = {
    "model": adapted,
    "optimizer": lambda: torch.optim.AdamW(small().parameters()),
    "state": lambda: lr.LowRankCommState(rank=4),
    "ddp": lambda: nn.parallel.DistributedDataParallel(small()),
    "t": lambda: torch.randn(2, 3, 4),
    "k": lambda: 1,
    "bias": lambda: True,
} | dict.fromkeys(
    [
        *("rank", "rank_in", "rank_out", "in_channels", "out_channels", "groups", "kernel_size", "kh", "kw", "kd"),
        *("num_embeddings", "embedding_dim", "in_features", "out_features", "embed_dim", "kdim", "vdim"),
    ],
    lambda: 4,
)
"""What the variables of promised calls stand for, made anew for every call."""

ELSEWHERE = {
    "model.set_attn_implementation": "tests/kv_cache/transformers/test_cache.py",
    "factorize_kv_": "tests/kv_cache/transformers/test_factorize_kv.py",
    "absorb_mla_": "tests/kv_cache/transformers/test_mla.py",
    "lr.attach_low_rank_reduce": "tests/distributed/fsdp_worker.py",
}
"""Calls that need a transformers model or a group of processes, and the tests that run them."""


def runnable() -> list[Promise]:
    """Promises that are one whole call of this library, of torch.nn, or of an object in ``MAKERS``."""
    found = []
    for promise in PROMISES:
        tree = parsed(promise.code)
        call = tree.body if tree is not None else None
        if not isinstance(call, ast.Call) or ast.unparse(call.func) == "_" or "..." in ast.unparse(call):
            continue
        function, root = resolve(call.func, promise.owner), ast.unparse(call.func).partition(".")[0]
        ours = getattr(inspect.getmodule(function), "__name__", "").startswith(("lowrank_layers", "torch.nn"))
        if (ours and complete(function, call)) or (
            function is None and root in MAKERS and "." in ast.unparse(call.func)
        ):
            found.append(promise)
    return found


def complete(function: Any, call: ast.Call) -> bool:
    """Whether the text names every argument that has to be given, and not only the one it speaks of."""
    try:
        inspect.signature(function).bind(*call.args, **{str(keyword.arg): 0 for keyword in call.keywords})
    except TypeError:
        return False
    return True


@pytest.fixture
def one_process():
    """A group of this process alone, for what is promised of DDP."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("promise", runnable(), ids=str)
@pytest.mark.usefixtures("one_process")
def test_named_calls_run(promise):
    tree = parsed(promise.code)
    name = ast.unparse(tree.body.func)
    if name in ELSEWHERE:
        assert name.rpartition(".")[2] in (ROOT / ELSEWHERE[name]).read_text(encoding="utf-8")
        return
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    values = {key: make() for key, make in MAKERS.items() if key in names}
    scope = vars(inspect.getmodule(promise.owner) or lr) | {"lr": lr, "nn": nn, "torch": torch}
    scope |= {key: getattr(lr, key) for key in names & set(lr.__all__)}
    eval(compile(tree, promise.where, "eval"), scope, values)


def remedies() -> list[tuple[str, str]]:
    """In-place functions that an error message or a docstring names, as ``densify_``; by file."""
    found = set()
    for path in (ROOT / "lowrank_layers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                words = re.findall(r"(?<![\w.{])([a-z]\w*[a-z]_)(?![\w{}])", node.value)
                found |= {(path.relative_to(ROOT).as_posix(), word) for word in words}
    return sorted((path, word) for path, word in found if word not in FOREIGN)


@pytest.mark.parametrize(("path", "name"), remedies())
def test_in_place_functions_that_a_text_names_exist(path, name):
    assert name in lr.__all__ or any(key.rpartition(".")[2] == name for key in CALLABLES), name
