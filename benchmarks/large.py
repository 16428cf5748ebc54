"""Models larger than memory: ``compress_checkpoint`` on random Llamas of 0.3, 0.6 and 1.1 B and on SmolLM2.

The random ones are written by this script, in bfloat16 and in shards, and compressed to 60 % on 8 x 512 random tokens,
each in a process of its own, whose peak memory (resident, with what is mapped from files) by part and processor seconds
per block are printed; a layer that the plan leaves dense takes less. Three of them are equally wide and differ in
depth: time is linear in depth, and in the width it grows with the cube, as that of a singular value decomposition does,
which a narrow model of the same size shows. SmolLM2 (benchmarks/smollm2.py) takes 32 x 256 tokens of WikiText in fp32;
its time is also given in passes forward and backward over these tokens, measured in another process of the same run;
once more it is compressed with hidden units among the methods.
The estimate on paper (``large_models.work_of``) takes its speed from the smallest model; the others test it.

It takes about an hour of one core and 30 GB of disk for the largest model; ``--models`` chooses, and results of the
models in ``--known``, a file that the script writes, are taken from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.large_models import SHAPES, Work, work_of, write_random
from benchmarks.vision import import_torchvision

RANDOM = ("0.3 B", "0.6 B", "1.1 B")
NARROW = "0.3 B, narrow"
SMOLLM2 = "smollm2"
UNITS = "smollm2, hidden units"
MEMORY = 3.0
"""GB that the largest random model may take."""
SPREAD, PASSES, BESIDE, PAPER = 1.25, 6.0, 1.5, 0.2
PARTS = ("calibrate", "plan", "factorize", "write")


def compress(source: str, target: str, tokens: str, which: str, threads: int) -> dict[str, Any]:
    """Compresses, in a process of its own, and returns processor seconds and peaks of memory by part and block."""
    import_torchvision()
    import transformers  # noqa: F401 - its memory is part of what the process takes from the beginning

    from lowrank_layers.checkpoint import compress as module

    torch.set_num_threads(threads)
    before = peak_since_last()
    marks: list[tuple[str, float, float]] = [("", time.process_time(), before)]

    def marked(name: str, part: Any) -> Any:
        def run(*args: Any, **settings: Any) -> Any:
            found = part(*args, **settings)
            marks.append((name or str(args[1]), time.process_time(), peak_since_last()))
            return found

        return run

    own: Any = module
    own.calibrate_in_stages = marked("calibrate", own.calibrate_in_stages)
    own.make_plan = marked("plan", own.make_plan)
    own.build_in_sequence = marked("factorize", own.build_in_sequence)
    own.write_model = marked("write", own.write_model)
    own.LayerStore.keep = marked("", own.LayerStore.keep)
    methods = [*lr.METHODS.values(), lr.HiddenUnitsMethod()] if which == UNITS else None
    plan = lr.compress_checkpoint(source, target, lr.Budget(params=0.6), list(torch.load(tokens)), methods=methods)
    parts: dict[str, float] = {}
    blocks: dict[str, float] = {}
    peaks: dict[str, float] = {}
    block_peaks: dict[str, float] = {}
    last, highest = marks[0][1], 0.0
    for (_, start, _), (name, end, peak) in itertools.pairwise(marks):
        highest = max(highest, peak)
        if name in PARTS:
            parts[name], peaks[name], last, highest = end - last, highest, end, 0.0
        elif ".layers." in name:
            block = name.split(".layers.")[1].split(".")[0]
            blocks[block] = blocks.get(block, 0.0) + end - start
            block_peaks[block] = max(block_peaks.get(block, 0.0), peak)
    factorized = {block: sum(f".layers.{block}." in entry.name for entry in plan if entry.rank) for block in blocks}
    found = {"parts": parts, "blocks": blocks, "peaks": peaks, "block peaks": block_peaks, "factorized": factorized}
    return found | {"peak": max(peaks.values()), "before": before, "kept": plan.after.params}


def peak_since_last() -> float:
    """Peak of resident memory since the last call, in GB; since the start where the system does not forget it."""
    try:
        status = Path("/proc/self/status").read_text()
        peak = float(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return peak


def passes(source: str, tokens: str, threads: int) -> float:
    """Returns processor seconds of a pass forward and back over all tokens, with all gradients, in its own process."""
    import_torchvision()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(source)
    batches = torch.load(tokens)
    start = 0.0
    for k, batch in enumerate([batches[0], *batches]):
        if k == 1:
            start = time.process_time()
        logits = model(batch, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        model.zero_grad()
    return time.process_time() - start


def child(args: argparse.Namespace, what: str, *given: str) -> Any:
    """Runs one of the two functions above in a new process."""
    command = [sys.executable, "-m", "benchmarks.large", "--child", what, *given, "--threads", str(args.threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env, text=True).stdout
    return json.loads(out.splitlines()[-1])


def random_model(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Writes a random model and compresses it."""
    import_torchvision()
    shape = SHAPES[name]
    write_random(folder / "dense", shape)
    count, length = (4, 64) if name == "smoke" else (8, 512)
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(shape.vocabulary, (count, length), generator=generator).split(1), folder / "tokens")
    found = child(args, "compress", *map(str, (folder / "dense", folder / "small", folder / "tokens", name)))
    return found | {"params": shape.params, "tokens": count * length}


def smollm2_model(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Compresses SmolLM2 on WikiText."""
    from benchmarks.kv_subjects import wikitext  # only here: it needs the shared data
    from benchmarks.smollm2 import smollm2

    model, tokenizer = smollm2()
    from transformers import LlamaConfig, LlamaForCausalLM

    body = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    plain = LlamaForCausalLM(LlamaConfig(**body))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "dense", max_shard_size="200MB")
    ids = tokenizer(wikitext("valid"), return_tensors="pt").input_ids[0, : 32 * 256].view(32, 256)
    torch.save(ids.split(1), folder / "tokens")
    params = sum(parameter.numel() for parameter in plain.parameters())
    del model, plain
    paths = list(map(str, (folder / "dense", folder / "small", folder / "tokens")))
    found = child(args, "compress", *paths, name)
    return found | {"params": params, "tokens": ids.numel(), "pass": child(args, "passes", paths[0], paths[2])}


def row(name: str, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    total, blocks = sum(found["parts"].values()), list(found["blocks"])[1:]  # the first waits for the plan
    parts = [f"{found['parts'][part]:.0f}" for part in PARTS]
    shown = [blocks[k] for k in (0, len(blocks) // 2, -1)]
    spread = [f"{found['blocks'][block]:.1f} ({found['factorized'][block]})" for block in shown]
    memory = f"{found['peak']:.2f} ({found['before']:.2f})"
    peaks = " / ".join(f"{found['peaks'][part]:.2f}" for part in PARTS)
    return [
        name,
        f"{found['params']:,}",
        memory,
        peaks,
        f"{total:.0f}",
        *parts,
        f"{1e8 * total / found['params']:.1f}",
        *spread,
    ]


def on_paper(found: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """The estimate for all models with the speeds of the smallest one, and its largest error on the others."""
    known = [name for name in SHAPES if name in found]
    base = work_of(SHAPES[known[0]], found[known[0]]["tokens"])
    speed = {part: getattr(base, part) / found[known[0]]["parts"][part] for part in PARTS[:3]}
    rows, worst = [], 0.0
    for name in known:
        work = work_of(SHAPES[name], found[name]["tokens"])
        guess = sum(getattr(work, part) / speed[part] for part in PARTS[:3])
        real = sum(found[name]["parts"][part] for part in PARTS[:3])
        worst = max(worst, abs(guess / real - 1))
        rows.append((name, f"{guess:.0f}", f"{real:.0f}", f"{guess / real - 1:+.0%}"))
    table = markdown_table(("model", "seconds, on paper", "measured", "error"), rows)
    speeds = ", ".join(f"{part} {value / 1e9:.0f} GFLOP/s" for part, value in speed.items())
    return f"Speeds of the smallest model: {speeds}.\n\n{table}", worst


def beyond() -> str:
    """The estimate for models that do not fit this machine, on 128 x 2,048 tokens at 200 TFLOP/s."""
    rows = []
    for name in ("7 B", "70 B"):
        shape, tokens = SHAPES[name], 128 * 2048
        work: Work = work_of(shape, tokens)
        flops = work.calibrate + work.plan + work.factorize
        dense = (work.plan + work.factorize) - 1.6 * 2 * tokens * shape.params
        hours = f"{flops / 2e14 / 3600:.2f}"
        sizes = f"{work.held / 1e9:.0f}", f"{work.disk / 1e9:.0f}"
        rows.append((name, str(shape.depth + 2), f"{flops:.1e}", f"{max(dense, 0) / flops:.0%}", hours, *sizes))
    head = ("model", "stages", "FLOP", "of them moments and fits", "GPU hours at 200 TFLOP/s", "held, GB", "disk, GB")
    return markdown_table(head, rows)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=[*RANDOM, NARROW, SMOLLM2, UNITS], help="which models")
    parser.add_argument("--work", type=Path, help="folder for weights and moments; by default a temporary one")
    parser.add_argument("--known", type=Path, help="a JSON file of results by model, read and added to")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="one tiny random model, no claims")
    args = parser.parse_args()
    if args.child:
        what, *given = args.child
        print(json.dumps({"compress": compress, "passes": passes}[what](*given, args.threads)))
        return
    line = machine(args, "transformers")
    known = json.loads(args.known.read_text()) if args.known is not None and args.known.exists() else {}
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for name in ["smoke"] if args.smoke else args.models:
        folder = Path(tempfile.mkdtemp(dir=args.work))
        try:
            if name in known:
                found[name] = known[name]
            else:
                make = smollm2_model if name in (SMOLLM2, UNITS) else random_model
                found[name] = make(args, name, folder)
        finally:
            shutil.rmtree(folder)
        if args.known is not None:
            known[name] = found[name]
            args.known.write_text(json.dumps(known))
        rows.append(row(name, found[name]))
        print(" | ".join(rows[-1]), flush=True)
    head = ["model", "parameters", "peak memory, GB (before)", "by part", "CPU seconds", *PARTS, "s per 100 M"]
    head += ["a block (layers factorized): second", "middle", "last"]
    text = [f"# Models larger than memory\n\n{line}", markdown_table(head, rows)]
    failed = []
    sized = {name: found[name] for name in found if name in SHAPES}
    if len(sized) > 1:
        paper, worst = on_paper(sized)
        text.append(paper)
        rates = [sum(each["parts"].values()) / each["params"] for name, each in sized.items() if name != NARROW]
        if max(rates) > SPREAD * min(rates):
            failed.append(f"time per parameter differs by {max(rates) / min(rates):.2f}")
        if worst > PAPER:
            failed.append(f"the estimate is off by {worst:.0%}")
    for name, each in sized.items():
        if name != "smoke" and each["peak"] > MEMORY:
            failed.append(f"{name} takes {each['peak']:.2f} GB")
    for name in (each for each in (SMOLLM2, UNITS) if each in found):
        each = found[name]
        ratio, beside = sum(each["parts"].values()) / each["pass"], each["peak"] - 4e-9 * each["params"]
        text.append(
            f"{name}: {ratio:.2f} forward and backward passes ({each['pass']:.0f} s each) over its tokens in all;"
            f" {beside:.2f} GB beside the model."
        )
        failed += [f"{name} takes {ratio:.1f} passes"] if ratio > PASSES else []
        failed += [f"{name} takes {beside:.2f} GB beside the model"] if beside > BESIDE else []
    text.append("On paper, beyond this machine:\n\n" + beyond())
    if not args.smoke:
        left = [name for name in (*RANDOM, NARROW, SMOLLM2, UNITS) if name not in found]
        text.append("Missed: " + "; ".join(failed) + "." if failed else "The bars of these models are met.")
        text += [f"Not run: {', '.join(left)}."] if left else []
    print(f"written to {write_result(args, 'large', chr(10).join(part + chr(10) for part in text))}")
    raise SystemExit(bool(failed) and not args.smoke)


if __name__ == "__main__":
    main()
