"""Optimizer state, final loss and step time of projected gradients on a small Llama, beside AdamW, GaLore, APOLLO."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, write_result
from .data import ROOT
from .peers import has, peer
from .vision import import_torchvision


def transformers() -> Any:
    if has("torchvision"):
        import_torchvision()
    import transformers as library

    return library


def model_and_tokens(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The small Llama and a text that it was not trained on; random ones with ``--smoke``."""
    library = transformers()
    if args.smoke:
        torch.manual_seed(0)
        config = library.LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        return library.LlamaForCausalLM(config), torch.randint(128, (20_000,))
    folder = str(ROOT / "pycode_llama")
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (ROOT / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    return model, library.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][0]


def is_embedding(model: nn.Module, p: Tensor) -> bool:
    return p is model.get_input_embeddings().weight


def ours(args: argparse.Namespace, table: bool = True, **settings: Any) -> Callable[[nn.Module], Optimizer]:
    def make(model: nn.Module) -> Optimizer:
        inner = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.decay, fused=True)
        settings.setdefault("refresh", args.refresh)
        return lr.LowRankProjection(
            inner, args.rank, scale=args.scale, target=lambda p: table or not is_embedding(model, p), **settings
        )

    return make


def theirs(args: argparse.Namespace, library: str, table: bool = True) -> Callable[[nn.Module], Optimizer]:
    def make(model: nn.Module) -> Optimizer:
        big = [p for p in model.parameters() if p.ndim == 2 and (table or not is_embedding(model, p))]
        ids = set(map(id, big))
        shared = {"rank": args.rank, "update_proj_gap": args.refresh, "proj_type": "std"}
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in ids]}]
        rest = {"lr": args.lr, "weight_decay": args.decay, "eps": 1e-8, "no_deprecation_warning": True}
        if library == "galore_torch":
            groups.append({"params": big, "scale": args.scale, **shared})
            return peer(library).GaLoreAdamW(groups, **rest)
        # as its README recommends; its scale enters by the square root
        groups.append({"params": big, "scale": args.scale**2, "proj": "random", "scale_type": "channel", **shared})
        return peer(library).APOLLOAdamW(groups, **rest)

    return make


def contenders(args: argparse.Namespace) -> dict[str, Callable[[nn.Module], Optimizer]]:
    often = max(1, args.refresh // 10)
    found: dict[str, Callable[[nn.Module], Optimizer]] = {
        "AdamW": lambda model: torch.optim.AdamW(
            model.parameters(), lr=args.lr * args.scale, weight_decay=args.decay / args.scale, fused=True
        ),
        "ours, svd": ours(args),
        "ours, svd, moments not rotated": ours(args, rotate="none"),
        "ours, power": ours(args, method="power"),
        f"ours, power every {often}": ours(args, method="power", refresh=often),
        "ours, random": ours(args, method="random"),
        "ours, svd, table dense": ours(args, table=False),
    }
    if has("galore_torch"):
        found["galore-torch, svd"] = theirs(args, "galore_torch")
        found["galore-torch, svd, table dense"] = theirs(args, "galore_torch", table=False)
    if has("apollo_torch"):
        found["apollo-torch, random"] = theirs(args, "apollo_torch")
    if args.only:
        found = {label: make for label, make in found.items() if label in args.only}
    return found


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state, with the projectors, which the peers keep in their own objects."""
    if isinstance(optimizer, lr.LowRankProjection):
        return optimizer.state_bytes()
    values = [value for state in optimizer.state.values() for value in state.values()]
    inside = [v for value in values if not isinstance(value, (Tensor, int)) for v in vars(value).values()]
    return sum(value.nbytes for value in values + inside if isinstance(value, Tensor))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def train(args: argparse.Namespace, base: nn.Module, tokens: Tensor, seed: int) -> dict[str, dict[str, Any]]:
    """Trains each optimizer on its own copy and the same batches; each step is led by another one."""
    held = tokens[-args.batch * 8 * args.length :].view(-1, args.batch, args.length)
    train_tokens = tokens[: -held.numel()]
    runs: dict[str, dict[str, Any]] = {}
    warm = max(1, args.steps // 10)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))

    for label, make in contenders(args).items():
        model = copy.deepcopy(base).train()
        optimizer = make(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        runs[label] = {"model": model, "optimizer": optimizer, "schedule": schedule, "loss": [], "seconds": []}
    generator = torch.Generator().manual_seed(seed)
    names = list(runs)
    for step in range(args.steps):
        starts = torch.randint(len(train_tokens) - args.length, (args.batch,), generator=generator)
        ids = torch.stack([train_tokens[s : s + args.length] for s in starts.tolist()])
        for turn in range(len(names)):
            run = runs[names[(step + turn) % len(names)]]
            run["optimizer"].zero_grad()
            loss = loss_of(run["model"], ids)
            loss.backward()
            start = time.process_time()
            run["optimizer"].step()
            run["seconds"].append(time.process_time() - start)
            run["schedule"].step()
            run["loss"].append(float(loss.detach()))
    for run in runs.values():
        with torch.no_grad():
            run["held"] = statistics.mean(float(loss_of(run["model"].eval(), ids)) for ids in held)
        run["bytes"] = state_bytes(run["optimizer"])
    return runs


def rows(args: argparse.Namespace, seeds: list[dict[str, dict[str, Any]]]) -> list[list[object]]:
    first = seeds[0]
    base = "galore-torch, svd" if "galore-torch, svd" in first else next(iter(first))
    whole = first["AdamW"]["bytes"] if "AdamW" in first else math.nan
    found: list[list[object]] = []
    for label, run in first.items():
        tails = [statistics.mean(each[label]["loss"][-max(1, args.steps // 10) :]) for each in seeds]
        held = [each[label]["held"] for each in seeds]
        # the first step makes the state; the mean has the refreshes in it, the median has not
        seconds = [s for each in seeds for s in each[label]["seconds"][1:]]
        ratio = statistics.median(sum(each[label]["seconds"][1:]) / sum(each[base]["seconds"][1:]) for each in seeds)
        found.append(
            [
                label,
                f"{run['bytes'] / 2**20:.2f} ({run['bytes'] / whole:.3f})",
                f"{statistics.mean(tails):.4f}",
                f"{statistics.mean(held):.4f} ({min(held):.4f} to {max(held):.4f})",
                f"{1e3 * statistics.median(seconds):.2f}",
                f"{1e3 * statistics.mean(seconds):.2f} ({ratio:.3f})",
            ]
        )
    return found


def verdict(seeds: list[dict[str, dict[str, Any]]]) -> str:
    """Compares bytes, losses and seconds per step with galore-torch, with the same projectors."""
    own, peer_label = "ours, svd", "galore-torch, svd"
    if not {own, peer_label, "AdamW"} <= seeds[0].keys():
        return ""

    def mean(label: str, what: str) -> float:
        values = [each[label][what] for each in seeds]
        return statistics.mean(
            v if isinstance(v, float) else statistics.mean(v[-max(1, len(v) // 10) :]) for v in values
        )

    checks = {
        "a third of AdamW's bytes": seeds[0][own]["bytes"] <= seeds[0]["AdamW"]["bytes"] / 3,
        "held-out loss": mean(own, "held") <= mean(peer_label, "held"),
        "loss of the last tenth": mean(own, "loss") <= mean(peer_label, "loss"),
        "seconds": sum(sum(e[own]["seconds"][1:]) for e in seeds)
        < sum(sum(e[peer_label]["seconds"][1:]) for e in seeds),
    }
    failed = [what for what, good in checks.items() if not good]
    return f"Not met against {peer_label}: {', '.join(failed)}." if failed else "All bars met."


def run(args: argparse.Namespace) -> str:
    base, tokens = model_and_tokens(args)
    seeds = [train(args, base, tokens, seed) for seed in range(args.seeds)]
    table = rows(args, seeds)
    what = "A random Llama" if args.smoke else "pycode_llama (5.5 M, width 256) learns tinyshakespeare"
    return "\n\n".join(
        [
            f"{what}: {args.steps} steps of {args.batch} x {args.length} tokens, {args.seeds} seeds; rank {args.rank},"
            f" a new projector every {args.refresh} steps, lr {args.lr:g}, scale {args.scale:g}, decay {args.decay:g};"
            f" AdamW at lr {args.lr * args.scale:g}. The table (the tied embedding) is projected unless it says dense."
            " All take turns on the same batches. Time is the optimizer's step alone, CPU; the mean has the new"
            " projectors in it, in brackets over galore-torch's.",
            markdown_table(
                [
                    "optimizer",
                    "state, MiB (of AdamW's)",
                    "loss, last tenth",
                    "held-out loss (lowest to highest seed)",
                    "step, ms, median",
                    "step, ms, mean",
                ],
                table,
            ),
            "" if args.smoke else verdict(seeds),
        ]
    ).rstrip()


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="tiny model, seconds")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--refresh", type=int, default=100)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--only", nargs="*", help="labels of the optimizers to run")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.seeds, args.length, args.rank, args.refresh = 12, 1, 16, 4, 10
    transformers()
    packages = [name for name in ("galore_torch", "apollo_torch") if has(name)]
    line = machine(args, "transformers", *packages)
    text = f"# Projected gradients\n\n{line}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'projection', text)}")


if __name__ == "__main__":
    main()
