"""Tables of benchmarks/results: whole files as pages, and single tables within other pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def files() -> list[Path]:
    """Every file of results."""
    return sorted(RESULTS.glob("*.md"))


def title(path: Path) -> str:
    """The headline of a file of results."""
    return path.read_text("utf-8").partition("\n")[0].lstrip("# ")


def index() -> str:
    """A table of all files, and what they are about."""
    rows = [f"| [{theme(path)}]({path.name}) | {title(path)} |" for path in files()]
    return "\n".join(["| results | |", "|---|---|", *rows])


def theme(path: Path) -> str:
    """What comes before the hardware and the month in the name of a file."""
    return path.stem.rsplit("_", 2)[0]


def newest(wanted: str) -> Path:
    """The latest file of a theme, such as ``"kv_real"``."""
    return max((path for path in files() if theme(path) == wanted), key=lambda path: path.stem[-6:])


def section(wanted: str, heading: str) -> str:
    """What stands below a heading of the latest file of a theme, up to the next heading; ``""`` is the title."""
    text = newest(wanted).read_text("utf-8")
    for block in re.split(r"^(?=#+ )", text, flags=re.M):
        first, _, rest = block.partition("\n")
        if block and heading in ("", first.lstrip("# ")):
            return rest.strip()
    raise LookupError(f"{newest(wanted).name} has no heading {heading!r}")


def table(wanted: str, heading: str) -> str:
    """The first table of a section."""
    lines = re.search(r"(^\|.*\n?)+", section(wanted, heading), re.M)
    return lines[0].rstrip()


def rows(wanted: str, heading: str) -> list[dict[str, str]]:
    """The cells of that table by the name of their column, without emphasis."""
    lines = re.findall(r"^\|.*$", section(wanted, heading), re.M)
    cells = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
    head, _, *body = cells
    return [dict(zip(head, row, strict=True)) for row in body if len(row) == len(head)]


def number(cell: str) -> float:
    """The first number of a cell."""
    return float(re.search(r"[-+]?[\d,]*\.?\d+", cell)[0].replace(",", ""))


def script(path: Path) -> str:
    """The benchmark that writes a file: the longest of those whose name its name begins with."""
    found = [each.stem for each in (ROOT / "benchmarks").glob("*.py") if path.stem.startswith(f"{each.stem}_")]
    return max(found, key=len)


def page(path: Path) -> str:
    """A file of results as a page, with the command that wrote it."""
    text = path.read_text("utf-8").rstrip()
    head, _, rest = text.partition("\n")
    return f"{head}\n\n`python -m benchmarks.{script(path)}`\n{rest}\n"
