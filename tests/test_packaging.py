"""The source distribution is complete, the wheel holds the package, and README's first block runs on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import lowrank_layers as lr

ROOT = Path(__file__).resolve().parents[1]
TOP = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
       "conftest.py", "constraints.txt", "mkdocs.yml", "pyproject.toml", "setup.cfg")  # fmt: skip
FOLDERS = ("benchmarks", "docs", "examples", "lowrank_layers", "tests")
DIST_INFO = f"lowrank_layers-{lr.__version__}.dist-info/"
pytest.importorskip("build")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What is under version control, where a build leaves nothing behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in TOP:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def expected(source) -> set[str]:
    """The files of the source, before a build adds its own."""
    return files(source)


@pytest.fixture(scope="module")
def built(source, expected, tmp_path_factory) -> Path:
    """The folder of both distributions, as ``make dist`` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(DIST_INFO + "METADATA"))


def test_the_source_distribution_holds_everything(built, expected):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    added = {name for name in names if name.startswith("lowrank_layers.egg-info/")}
    assert names - added == expected | {"PKG-INFO"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel, expected):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(DIST_INFO)}
        assert archive.read(DIST_INFO + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert names == {name for name in expected if name.startswith("lowrank_layers/")}
    assert "lowrank_layers/py.typed" in names
    assert any(re.fullmatch(r"lowrank_layers/kv_cache/kernels/\w+\.cpp", name) for name in names)
    assert wheel.name == f"lowrank_layers-{lr.__version__}-py3-none-any.whl"


def test_what_the_metadata_say(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert {re.split(r"[^\w-]", each)[0] for each in required} == {"torch", "safetensors", "tqdm"}
    least = metadata["Requires-Python"].removeprefix(">=")
    classified = [each.rpartition(" ")[2] for each in metadata.get_all("Classifier") if "Python :: 3." in each]
    assert classified[0] == least


def test_the_citation_names_the_license_and_leaves_the_version_to_the_package():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^license: Apache-2\.0$", text, re.M)
    assert not re.search(r"^version:", text, re.M)


def test_the_installed_wheel_runs_readmes_first_block_and_the_program(wheel, tmp_path):
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    check = f"{block}\nfrom pathlib import Path\nassert Path(lr.__file__).is_relative_to({str(site)!r})\n"
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "small.safetensors").is_file()
    program = [sys.executable, str(site / "bin" / "lowrank"), "--help"]
    shown = subprocess.run(program, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert "extract-lora" in shown


def test_the_entry_points_are_the_program_and_the_plugin_of_vllm(wheel):
    points = ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        points.read_string(archive.read(DIST_INFO + "entry_points.txt").decode())
    assert {section: dict(points[section]) for section in points.sections()} == {
        "console_scripts": {"lowrank": "lowrank_layers.command_line:main"},
        "vllm.general_plugins": {"lowrank_layers": "lowrank_layers.interop.vllm:register"},
    }
