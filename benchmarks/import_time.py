"""CPU seconds of importing this library and PEFT after torch. Fails above a budget of 0.3 s."""

from __future__ import annotations

import statistics
import subprocess
import sys

from .common import arguments, machine, markdown_table, write_result

BUDGET = 0.3
TORCHVISION = "from benchmarks.vision import import_torchvision\nimport_torchvision()"
"""PEFT imports torchvision, which needs help beside a CPU-only torch; its time is not counted."""


def import_seconds(package: str, rounds: int) -> float:
    """Median CPU seconds of the import after torch and torchvision, each time in a new process."""
    timed = f"start = time.process_time()\nimport {package}\nprint(time.process_time() - start)"
    lines = f"{TORCHVISION}\nimport time, torch\n{timed}"
    command = [sys.executable, "-W", "ignore", "-c", lines]
    texts = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    return statistics.median(float(text.split()[-1]) for text in texts)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--smoke", action="store_true", help="one round, this library only")
    args = parser.parse_args()
    rounds, packages = (1, ("lowrank_layers",)) if args.smoke else (5, ("lowrank_layers", "peft"))
    seconds = {package: import_seconds(package, rounds) for package in packages}
    table = markdown_table(["package", "s"], [[package, f"{taken:.3f}"] for package, taken in seconds.items()])
    text = f"# Import\n\n{machine(args)}; CPU seconds beyond torch, median of {rounds}\n\n{table}"
    print(f"{text}\nwritten to {write_result(args, 'import_time', text)}")
    raise SystemExit(seconds["lowrank_layers"] > BUDGET and not args.smoke)


if __name__ == "__main__":
    main()
