"""A language model with 80, 60 and 40 % of the parameters of its blocks, beside other ways to choose ranks and factors.

SmolLM2-135M-Instruct from its package (``benchmarks/smollm2.py``), or the model of transformers in ``--model``. The
embeddings stay as they are. Every row is a setting of the same pipeline, calibrated on the same tokens of WikiText-2
(valid), without recovery: plain SVD; whitening by the inputs with one ratio for all layers (the idea of SVD-LLM) or
with ranks by relative errors (that of BALF); weighting by inputs and gradients, in one shot and in sequence; measured
allocation; and the default. Perplexity of windows of 512 tokens of WikiText-2 (test), code and stories, each text from
its beginning on; LAMBADA's last words where ``--lambada`` says how many. ``--bytes`` compares ranks, int8 and both at
equal bytes. ``--refine`` and ``--distill`` train the default on further tokens of WikiText-2 (valid), without labels.

Rows that are done are kept in ``--work``, with what was measured of each layer, and not measured again; the result file
is written after each of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.language_bytes import byte_report, byte_rows, keep_rows, kept_rows
from benchmarks.language_scores import measured
from benchmarks.language_settings import DEFAULT, SETTINGS, compressed
from benchmarks.language_texts import Case, case, small
from benchmarks.language_training import DISTILLED, REFINED, asked, tokens_asked, trained
from lowrank_layers.files import replacing

SKIP = ("lm_head", "embed_tokens")
BARS = {0.8: {"WikiText": 43.5, "code": 21.7}, 0.6: {"WikiText": 83.5, "code": 120.0}}
"""What the default has to reach on SmolLM2 with 8,192 tokens of calibration and six windows."""


def peak(device: str) -> float:
    """GiB at most so far: of the device, or of the whole process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def block_parameters(model: Any) -> int:
    """Parameters of the model without those of its embeddings."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(parameter) for end in ends for parameter in end.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)


def calibrated(subject: Case, args: argparse.Namespace) -> tuple[lr.Statistics, list[Any]]:
    """The statistics of the layers that may change, and the batches that they are of."""
    batches = [{"input_ids": x, "use_cache": False} for x in subject.calibration.split(args.batch)]
    start = time.perf_counter()
    planned: list[Callable[[str, Any], bool]] = [lambda name, _: not set(name.split(".")) & set(SKIP)]
    stats = lr.calibrate(subject.model, batches, loss=lr.SampledCrossEntropy(), target=planned)
    print(f"calibrated in {time.perf_counter() - start:.0f} s, {peak(args.device):.1f} GiB", flush=True)
    return stats, batches


def rows(
    subject: Case,
    args: argparse.Namespace,
    known: dict[str, dict[str, float]],
    effects: dict[str, Any],
    calibration: Callable[[], tuple[lr.Statistics, list[Any]]],
) -> Iterator[str]:
    """Measures the rows that are not known yet, adds them, and says which."""
    whole = block_parameters(subject.model)

    def wanted(label: str, size: float | None) -> str | None:
        key = label if size is None else f"{size:g} {label}"
        return key if key not in known and (size is None or re.search(args.only, label)) else None

    if (key := wanted("dense", None)) is not None:
        known[key] = {"kept, %": 100.0} | measured(subject.model, subject, args.rounds)
        yield key
    labels = [*SETTINGS, *asked(args)]
    left = {(size, label): key for size in args.sizes for label in labels if (key := wanted(label, size)) is not None}
    if not left:
        return
    stats, batches = calibration()
    for (size, label), key in left.items():
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        setting = SETTINGS.get(label, SETTINGS[DEFAULT])
        try:
            model = compressed(subject.model, setting, stats, batches, size, effects, SKIP)
        except lr.BudgetError as error:
            print(f"{key}: {error}", flush=True)
            continue
        if label not in SETTINGS:
            start = time.perf_counter()
            trained(label, model, subject.model, subject.training, args)
        spent = {"seconds": time.perf_counter() - start, "peak GiB": peak(args.device)}
        kept = {"kept, %": 100 * block_parameters(model) / whole}
        known[key] = kept | measured(model, subject, args.rounds) | spent
        yield key


def table(known: dict[str, dict[str, float]], prefix: str) -> str:
    """The rows of one size in order, the dense model first."""
    labels = (*SETTINGS, REFINED, DISTILLED)
    chosen = {label: known[f"{prefix}{label}"] for label in labels if f"{prefix}{label}" in known}
    head = list(dict.fromkeys(name for row in chosen.values() for name in row))
    lines = []
    for label, row in {"dense": known["dense"], **chosen}.items():
        lines.append([label, *(f"{row[name]:.{digits(row[name])}f}" if name in row else "" for name in head)])
    return markdown_table(["setting", *head], lines)


def digits(value: float) -> int:
    """How many decimals are shown."""
    return 0 if value >= 1000 else 1 if value >= 100 else 2


def misses(known: dict[str, dict[str, float]]) -> list[str]:
    """Where the default is above a baseline's perplexity, or above a bar."""
    found = []
    sizes = {key.split(" ", 1)[0] for key in known if key != "dense"}
    for size in sorted(sizes, reverse=True):
        ours = known.get(f"{size} {DEFAULT}")
        if ours is None:
            continue
        for text in (name for name in ("WikiText", "code", "stories") if name in ours):
            others = [label for label in SETTINGS if not label.startswith("default")]  # the default in sequence is ours
            rows = {label: known[f"{size} {label}"] for label in others if f"{size} {label}" in known}
            best = min((row[text], label) for label, row in rows.items())
            if ours[text] > best[0]:
                found.append(f"{float(size):.0%}, {text}: {ours[text]:.1f}, {best[1]} has {best[0]:.1f}")
            bar = BARS.get(float(size), {}).get(text)
            if bar is not None and ours[text] > bar:
                found.append(f"{float(size):.0%}, {text}: {ours[text]:.1f} > {bar}")
    return found


def report(name: str, line: str, args: argparse.Namespace, known: dict[str, dict[str, float]]) -> str:
    """The whole result file."""
    text = [
        f"# Language models, no recovery\n\n{line}\n\n{name}; {args.calibration:,} tokens of WikiText-2 (valid) for"
        f" calibration, {args.windows} windows of WikiText-2 (test) scored. Layers are measured once for all sizes: the"
        " first row that needs it has the seconds.\n"
    ]
    sizes = sorted({float(key.split(" ", 1)[0]) for key in known if key != "dense"}, reverse=True)
    text += [f"## {size:.0%} of the parameters of the layers\n\n{table(known, f'{size:g} ')}\n" for size in sizes]
    missed = misses(known)
    text.append("Not met: " + "; ".join(missed) if missed else "The default is nowhere above a row of the same size.")
    return "\n".join(text)


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--model", type=Path, help="a folder of transformers to read in the place of SmolLM2")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="parts that are kept")
    parser.add_argument("--bytes", type=float, nargs="*", default=[], help="parts of the bytes of the layers, in fp32")
    parser.add_argument("--only", default="", help="a regular expression for the rows to measure; kept ones are shown")
    parser.add_argument("--calibration", type=int, default=8192, metavar="TOKENS", help="tokens to calibrate on")
    parser.add_argument("--batch", type=int, default=2, help="windows in a batch of the calibration")
    parser.add_argument("--windows", type=int, default=6, help="windows of WikiText to score, a third of other texts")
    parser.add_argument("--lambada", type=int, default=0, help="passages of LAMBADA to score")
    parser.add_argument("--refine", type=int, default=0, metavar="TOKENS", help="refine the default on so many tokens")
    parser.add_argument("--distill", type=int, default=0, metavar="STEPS", help="train the default by the dense model")
    parser.add_argument("--rounds", type=int, default=3, help="times that tokens per second are measured; 0 for none")
    parser.add_argument("--work", type=Path, help="folder for finished rows; by default a temporary one")
    parser.add_argument("--smoke", action="store_true", help="a random model and one size, no claims")
    args = parser.parse_args()
    line = machine(args, "transformers")
    if args.smoke:
        args.sizes, args.bytes, args.rounds, args.refine, args.distill = [0.6], [0.2], 1, 128, 2
        subject = small(args.device)
    else:
        subject = case(args.model, args.device, args.calibration, args.windows, args.lambada, tokens_asked(args))
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        path = work / f"language-{subject.calibration.numel()}.json"
        effects_path = path.with_name(f"effects-{subject.calibration.numel()}.json")
        known, effects = (json.loads(each.read_text()) if each.exists() else {} for each in (path, effects_path))
        calibration = functools.cache(lambda: calibrated(subject, args))
        for key in rows(subject, args, known, effects, calibration):
            print(key, *(f"{name} {value:.2f}" for name, value in known[key].items()), sep=" | ", flush=True)
            for each, found in ((path, known), (effects_path, effects)):
                with replacing(each) as kept:
                    kept.write_text(json.dumps(found))
            write_result(args, "language", report(subject.name, line, args, known))
        path = work / f"language-bytes-{subject.calibration.numel()}.json"
        known_bytes = kept_rows(path)
        for key in byte_rows(subject, args, known_bytes, calibration, SKIP):
            print(key, *(f"{name} {value:.2f}" for name, value in known_bytes[key].items()), sep=" | ", flush=True)
            keep_rows(path, known_bytes)
        text = report(subject.name, line, args, known)
    print(f"{text.splitlines()[-1]}\nwritten to {write_result(args, 'language', text + byte_report(known_bytes))}")


if __name__ == "__main__":
    main()
