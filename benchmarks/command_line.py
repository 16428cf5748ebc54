"""Peak memory and CPU seconds of the commands on sharded checkpoints of 1 GB, and on pairs of 500 MB.

The checkpoints have the names and shapes of a decoder with grouped attention in fp32, and random values; the tuned one
of a pair has changes of rank 16 with noise, other norms, and 8 more rows in its vocabulary. Each command is a process
of its own, whose peak resident memory is read at its end; the first row is that of a process which prints help. Fails
if ``inspect`` of 1 GB takes 1.5 GB, or ``extract-lora`` of two 500 MB takes 1 GB. It takes two minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import arguments, machine, markdown_table, write_result

CHILD = """
import sys, time, torch
from pathlib import Path
from lowrank_layers.command_line import main
torch.set_num_threads(int(sys.argv[1]))
code = main(sys.argv[2:])
# not ru_maxrss, which starts from that of the parent
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(code, time.process_time(), peak.split()[1], file=sys.stderr)
"""
GIGABYTE = 10**9
LIMITS = {"inspect": 1.5 * GIGABYTE, "extract-lora": GIGABYTE}


@dataclass(frozen=True)
class Size:
    """A decoder."""

    width: int
    inner: int
    grouped: int
    depth: int
    vocabulary: int

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for k in range(self.depth):
            for name, rows, columns in (
                ("self_attn.q_proj", self.width, self.width),
                ("self_attn.k_proj", self.grouped, self.width),
                ("self_attn.v_proj", self.grouped, self.width),
                ("self_attn.o_proj", self.width, self.width),
                ("mlp.gate_proj", self.inner, self.width),
                ("mlp.up_proj", self.inner, self.width),
                ("mlp.down_proj", self.width, self.inner),
            ):
                yield f"model.layers.{k}.{name}.weight", (rows, columns)
            yield f"model.layers.{k}.input_layernorm.weight", (self.width,)
        yield "model.norm.weight", (self.width,)


FULL = (Size(896, 4864, 128, 2, 32_000), Size(896, 4864, 128, 8, 151_936))
FULL_PAIRS = (Size(896, 4864, 128, 1, 16_000), Size(896, 4864, 128, 7, 32_000))
SMOKE = (Size(32, 64, 16, 2, 100),)


def write(size: Size, folder: Path, shards: int = 4) -> None:
    """A sharded checkpoint with random values."""
    folder.mkdir()
    torch.manual_seed(0)
    names = list(size.shapes())
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in names[k::shards]}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_tuned(base: Path, folder: Path) -> None:
    """The checkpoint after a change of everything."""
    folder.mkdir()
    torch.manual_seed(1)
    for file in base.glob("*.safetensors"):
        save_file({name: tuned(name, tensor) for name, tensor in load_file(file).items()}, folder / file.name)
    (folder / "model.safetensors.index.json").write_text((base / "model.safetensors.index.json").read_text())


def tuned(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim == 1:
        return tensor + 0.1
    if "embed" in name:
        return torch.cat([tensor, tensor[:8]])
    rows, columns = tensor.shape
    low = torch.randn(rows, 16) @ torch.randn(16, columns) / (16 * columns) ** 0.5
    return (tensor.float() + 0.1 * low + 0.01 * torch.randn(rows, columns) / columns**0.5).to(tensor.dtype)


def run(threads: int, *argv: object) -> tuple[float, int]:
    """CPU seconds and peak resident bytes of a command."""
    command = [sys.executable, "-c", CHILD, str(threads), *map(str, argv)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    code, seconds, kilobytes = done.stderr.split("\n")[-2].split()
    if code != "0":
        raise SystemExit(f"{' '.join(map(str, argv))}: {done.stderr}")
    return float(seconds), 1024 * int(kilobytes)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--smoke", action="store_true", help="one small checkpoint, two commands, no claims")
    args = parser.parse_args()
    line = machine(args)
    rows: list[tuple[str, ...]] = []
    failed = []

    def measure(read: int, *argv: object) -> None:
        if args.smoke and argv[0] not in LIMITS:
            return
        seconds, peak = run(args.threads, *argv)
        command = str(argv[0]) if argv else "(help)"
        rows.append((command, f"{read / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{seconds:.0f}"))
        print(" | ".join(rows[-1]), flush=True)
        if peak > LIMITS.get(command, float("inf")) and not args.smoke:
            failed.append(command)

    if not args.smoke:
        measure(0)
    with tempfile.TemporaryDirectory() as scratch:
        for k, size in enumerate(SMOKE if args.smoke else FULL):
            folder, small = Path(scratch, f"model-{k}"), Path(scratch, f"small-{k}.safetensors")
            write(size, folder)
            for argv in ("inspect", folder), ("apply", folder, small, "--rank", 64):
                measure(size_of(folder), *argv)
            small.unlink(missing_ok=True)
        for k, size in enumerate(SMOKE if args.smoke else FULL_PAIRS):
            base, other = Path(scratch, f"base-{k}"), Path(scratch, f"tuned-{k}")
            write(size, base)
            write_tuned(base, other)
            read = size_of(base) + size_of(other)
            adapter, merged = Path(scratch, f"adapter-{k}"), Path(scratch, f"merged-{k}.safetensors")
            measure(read, "extract-lora", base, other, adapter, "--rank", 16)
            measure(size_of(base), "merge-lora", base, adapter, merged)
    head = ("command", "weights read, MB", "peak resident, MB", "CPU seconds")
    report = f"# The command line on large checkpoints\n\n{line}; fp32, four shards\n\n{markdown_table(head, rows)}"
    if not args.smoke:
        verdict = (
            f"Above the limit: {', '.join(failed)}." if failed else "Below 1.5 GB (inspect) and 1 GB (extract-lora)."
        )
        report += f"\n\n{verdict}"
    print(f"written to {write_result(args, 'command_line', report)}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
