"""The core stays light."""

import importlib.util
import json
import statistics
import subprocess
import sys

from benchmarks.vision import import_torchvision

HEAVY = (
    "transformers",
    "peft",
    "matplotlib",
    "torchvision",
    "sklearn",
    "tensorly",
    "tltorch",
    "rich",
    "pandas",
    "scipy",
)
SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import lowrank_layers
spent = time.process_time() - start
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps([spent, new, sorted(set(sys.modules))]))
"""


def measure():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_importing_adds_nothing_heavy_and_at_most_300_ms():
    runs = [measure() for _ in range(3)]
    loaded = set(runs[0][2])
    assert not loaded & set(HEAVY)
    assert statistics.median(run[0] for run in runs) <= 0.3


def test_importing_has_no_side_effects():
    code = "import torch; a = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
    code += "import lowrank_layers\n"
    code += "b = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
    code += "assert torch.equal(a[0], b[0]) and a[1:] == b[1:]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_public_is_documented_and_listed():
    import lowrank_layers as lr

    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # transformers imports it where it is installed
    assert sorted(lr.__all__) == sorted(set(lr.__all__))
    for name in lr.__all__:
        value = getattr(lr, name)
        if callable(value) and hasattr(value, "__module__"):
            assert value.__doc__ or name in ("Rank",), name
