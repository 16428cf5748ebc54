"""C++ that is compiled when it is first called for, once per machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from ..files import cache_folder, replacing

SWITCH = "LOWRANK_COMPILE"
"""Environment variable: ``0`` keeps the library from calling a compiler."""
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""Flags by what torch finds in the processor; named one by one, so that a folder may be shared by different ones."""
_BUILDING = threading.Lock()


@functools.cache
def compiled(folder: Path) -> ctypes.CDLL | None:
    """The functions of C++ files; ``None`` where they cannot be compiled.

    The shared library is kept in ``$XDG_CACHE_HOME/lowrank_layers`` (``~/.cache/lowrank_layers``), by a digest of the
    sources, the compiler and the flags. The compiler is ``$CXX``, or ``c++``. Nothing is compiled except on Linux, and
    where the environment variable ``LOWRANK_COMPILE`` is ``0``.

    Args:
        folder: where the sources are, headers too.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or sys.platform != "linux" or os.environ.get(SWITCH) == "0":
        return None
    flags = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", *_instructions())
    sources = sorted(folder.glob("*.cpp"))
    texts = [path.read_text() for path in sorted(folder.glob("*.h")) + sources]
    digest = hashlib.sha256("\0".join([*texts, os.path.realpath(compiler), *flags]).encode()).hexdigest()
    command, name = [compiler, *flags, *map(str, sources)], f"{folder.name}_{digest[:16]}.so"
    try:
        try:
            return ctypes.CDLL(str(_kept(command, name)))
        except OSError:
            # a home that cannot be written to, or libraries that cannot be loaded from there
            with tempfile.TemporaryDirectory() as scratch:
                return ctypes.CDLL(str(_built(command, Path(scratch) / name)))
    except (OSError, subprocess.SubprocessError):
        return None


def _instructions() -> tuple[str, ...]:
    """The flags of the instructions that may be used."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = INSTRUCTIONS.get(capability, ())
    # products of 16-bit integers, which some processors with AVX-512 lack; earlier versions of torch do not tell
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return (*flags, "-mavx512vnni") if capability == "AVX512" and known.get("avx512_vnni") else flags


def _kept(command: list[str], name: str) -> Path:
    folder = cache_folder()
    path = folder / name
    with _BUILDING:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                _built(command, temporary)
    return path


def _built(command: list[str], path: Path) -> Path:
    subprocess.run([*command, "-o", str(path)], check=True, capture_output=True, timeout=120)
    return path
