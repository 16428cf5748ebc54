"""``import lowrank_layers`` is light, has no side effects, and brings every public name once."""

import ast
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_layers as lr
from benchmarks.vision import import_torchvision

PACKAGE = Path(lr.__file__).parent


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_brings_the_required_libraries_and_no_other():
    code = "import json, sys, torch, torch.distributed\n"
    code += "before = set(sys.modules)\n"
    code += "import lowrank_layers\n"
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    new = json.loads(run(code))
    allowed = {"lowrank_layers", "safetensors", "tqdm", *sys.stdlib_module_names}
    assert {name.partition(".")[0] for name in new if not name.startswith("torch.")} <= allowed
    # torch's own heavy parts, which it imports at their first use
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "torch.distributed."))]


def test_importing_has_no_side_effects():
    code = "import torch; a = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
    code += "import lowrank_layers\n"
    code += "b = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
    code += "assert torch.equal(a[0], b[0]) and a[1:] == b[1:]"
    run(code)


def test_a_torch_without_distributed_has_all_the_rest():
    code = "import torch.distributed; torch.distributed.is_available = lambda: False\n"
    code += "import lowrank_layers as lr; print(hasattr(lr, 'low_rank_hook'), *lr.__all__)"
    without, *names = run(code).split()
    assert without == "False"
    assert set(lr.__all__) - set(names) == {
        "LowRankCommState",
        "LowRankReduceState",
        "PowerSGDSettings",
        "attach_low_rank_reduce",
        "low_rank_hook",
        "merge_comm_states",
    }


def test_public_names_are_those_that_the_package_re_exports():
    names = [
        alias.asname
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    ]
    assert len(names) == len(set(names))
    assert sorted(names) == lr.__all__ == dir(lr)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lowrank_layers' has no attribute 'LowRankLinnear'"):
        lr.LowRankLinnear  # noqa: B018
    with pytest.raises(AttributeError, match=r"'lowrank_layers\.kv_cache' has no attribute 'LowRankKash'"):
        lr.kv_cache.LowRankKash  # noqa: B018


def test_everything_public_is_documented():
    with contextlib.suppress(ImportError):
        import_torchvision()  # transformers imports it where it is installed
    for name in lr.__all__:
        value = getattr(lr, name)
        if callable(value) and hasattr(value, "__module__"):
            assert value.__doc__ or name == "Rank", name
