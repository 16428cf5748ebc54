"""Runs the tests of what uses transformers with several versions of it; for development only.

    python -m benchmarks.transformers_versions 5.2.0 5.23.0

Each version is installed into a folder of ``--target-root`` (``pip install --target``, with its own requirements). A
folder that exists already is used as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

VERSIONS = ("5.2.0", "5.9.0", "5.14.1", "5.20.2", "5.23.0")
TRAINERS = tuple(f"tests/{folder}/test_trainer.py" for folder in ("compress/recovery", "lora", "spectrum"))
TESTS = ("tests/kv_cache", "tests/interop/transformers", *TRAINERS)


def needs(version: str) -> list[str]:
    """Requirements of this version that differ from those of newer ones."""
    number = tuple(map(int, version.split(".")))
    found = []
    if number < (5, 17):
        found += ["huggingface_hub<2", "httpx"]
    if number < (5, 15):
        found.append("tokenizers<0.23")
    return found


def install(version: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*pip, "--no-deps", f"transformers=={version}"], check=True)
    if needs(version):
        subprocess.run([*pip, *needs(version)], check=True)


def run(version: str, paths: list[str], more: list[str]) -> tuple[str, float]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.getcwd()]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    check = "import transformers; print(transformers.__version__)"
    found = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    if found.stdout.strip() != version:
        return f"not importable: {(found.stdout + found.stderr).strip().splitlines()[-1:]}", 0.0
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:logging", *TESTS, *more]
    out = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = out.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    for line in failed:
        print(f"  {version} {line}", flush=True)
    return lines[-1] if lines else out.stderr[-300:], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--target-root", type=Path, default=Path(".venv/transformers"))
    parser.add_argument("--also", nargs="*", default=[], help="version:folder, further folders for a version")
    parser.add_argument("--only", help="only the tests that match, as pytest's -k")
    options = parser.parse_args()
    rows = []
    for version in options.versions:
        folder = options.target_root / version
        if not folder.is_dir():
            install(version, folder)
        also = [name.partition(":")[2] for name in options.also if name.partition(":")[0] == version]
        rows.append((version, *run(version, [str(folder), *also], ["-k", options.only] if options.only else [])))
    print("| transformers | tests | seconds |\n|---|---|---|")
    for version, text, seconds in rows:
        print(f"| {version} | {text} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
