"""Adapters of the dense model on the factored one: what that costs, and what training anew gives.

A Llama that knows Python code (``pycode_llama`` in ``LOWRANK_DATA``) learns stories by LoRA of rank 8 on every linear
layer of its blocks. The blocks are factorized, with statistics of code, to parts of their parameters:

- *its own*: an adapter trained on the factored model, from nothing;
- *the dense model's*: the adapter that was trained on the dense model, loaded onto the factored one;
- *the dense model's, trained on*: a tenth as many further steps.

Figures are losses in nats per token on stories that nothing was trained on. ``--smoke`` takes a random model and few
steps.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_layers as lr
from benchmarks.language_settings import SINGLE

from .common import arguments, machine, markdown_table, write_result
from .data import ROOT, available
from .vision import import_torchvision

KEPT = (0.8, 0.6)
LENGTH = 128
BATCH = 8


def subject(smoke: bool) -> tuple[Any, Tensor, Tensor]:
    """The model, and rows of tokens of code and of stories."""
    import transformers

    if smoke:
        sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        return transformers.LlamaForCausalLM(config).eval(), *torch.randint(50, (2, 40, LENGTH))
    if not available("pycode_llama", "text"):
        raise SystemExit(
            "dense_adapters: got no folders pycode_llama and text in LOWRANK_DATA; see benchmarks/data.py."
        )
    folder = ROOT / "pycode_llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def rows(path: Path, characters: int) -> Tensor:
        ids = tokenizer(path.read_text(encoding="utf-8")[:characters], return_tensors="pt")["input_ids"][0]
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, rows(folder / "valid.txt", 200_000), rows(ROOT / "text" / "tinystories_v2_valid_slice.txt", 700_000)


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    return sum(float(model(part, labels=part).loss) * len(part) for part in rows.split(BATCH)) / len(rows)


def train(model: nn.Module, rows: Tensor, steps: int) -> None:
    """Trains the adapter with AdamW and a rate that falls to zero; rows come in the same order for everyone."""
    model.train()
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).repeat(BATCH * steps // len(rows) + 1)
    for chosen in order[: BATCH * steps].split(BATCH):
        optimizer.zero_grad()
        model(rows[chosen], labels=rows[chosen]).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return lr.add_lora_(copy.deepcopy(model), target="all-linear", rank=8, alpha=16)


def run(args: argparse.Namespace) -> tuple[str, list[list[object]]]:
    """Which losses the dense model has, and the rows of the table."""
    dense, code, stories = subject(args.smoke)
    held_out, learn = stories[:64], stories[64:] if not args.smoke else stories
    stats = lr.calibrate(dense, list(code[:128].split(BATCH)), loss=lr.SampledCrossEntropy())
    tuned = adapted(dense)
    train(tuned, learn, args.steps)
    about = f"The dense model: {loss(dense, held_out):.3f}, with its adapter {loss(tuned, held_out):.3f}."
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        lr.save_lora(tuned, folder)
        for kept in KEPT:
            budget = lr.Budget(params=kept, of="planned")
            plan = lr.make_plan(dense, budget, stats, SINGLE, skip=["lm_head", nn.Embedding])
            small = lr.factorize_(copy.deepcopy(dense), plan, stats=stats)
            own = adapted(small)
            train(own, learn, args.steps)
            moved = lr.load_lora(copy.deepcopy(small), folder)
            before = loss(moved, held_out)
            train(moved, learn, max(1, args.steps // 10))
            losses = [loss(small, held_out), before, loss(moved, held_out), loss(own, held_out)]
            rows.append([f"{kept:.0%}", *(f"{each:.3f}" for each in losses)])
            print(rows[-1], flush=True)
    return about, rows


HEAD = ["parameters kept in the blocks", "no adapter", "the dense model's", "the dense model's, trained on", "its own"]


def main() -> None:
    parser = arguments(__doc__ or "", threads=1)
    parser.add_argument("--smoke", action="store_true", help="a random model and few steps")
    parser.add_argument("--steps", type=int, default=50, help="steps of an adapter")
    args = parser.parse_args()
    if args.smoke:
        args.steps = 2
    import_torchvision()
    about = machine(args, "transformers")
    losses, rows = run(args)
    steps = f"{args.steps} steps of {BATCH} x {LENGTH} tokens. {losses}"
    text = f"# Adapters of the dense model\n\n{about}\n\n{__doc__}\n{steps}\n\n{markdown_table(HEAD, rows)}\n"
    print(text)
    print(write_result(args, "dense_adapters", text))


if __name__ == "__main__":
    main()
