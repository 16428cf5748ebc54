"""Lesson 6: fine-tune a trained Llama on new text with LoRA, with PiSSA, and in full.

python examples/06_lora.py [--model DIR] [--text FILE] [--steps 60] [--rank 16] [--out DIR]

The model is a small Llama trained on Python code, the text is Shakespeare's; both are read from ../shared/data unless
others are given. Needs the extras transformers and plot.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from course import begin, lesson, save
from language_model import DATA, load
from torch import Tensor, nn
from tqdm import trange

import lowrank_layers as lr
from lowrank_layers import plot

LENGTH = 128


def windows(tokens: Tensor, count: int, seed: int) -> Tensor:
    """Random windows of the text, ``[count, LENGTH + 1]``."""
    starts = torch.randint(len(tokens) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens[start : start + LENGTH + 1] for start in starts])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    logits = model(input_ids=batch[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, batches: Tensor) -> float:
    """Mean loss on held-out text."""
    model.eval()
    return float(torch.stack([loss_of(model, batch) for batch in batches.split(8)]).mean())


def train(model: nn.Module, groups: list, tokens: Tensor, steps: int, batch: int, label: str) -> list[float]:
    """Trains with AdamW on random windows and returns the loss of each step."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    model.train()
    seen = []
    for step in (bar := trange(steps, desc=label)):
        optimizer.zero_grad()
        loss = loss_of(model, windows(tokens, batch, seed=step))
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
        bar.set_postfix(loss=f"{seen[-1]:.3f}")
    return seen


@torch.no_grad()
def generate(model: nn.Module, tokenizer: object, prompt: str, count: int = 40) -> str:
    """Text generated greedily after the prompt."""
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0].tolist())


def main() -> None:
    parser = lesson(__doc__)
    parser.add_argument("--model", type=Path, default=DATA / "pycode_llama")
    parser.add_argument("--text", type=Path, default=DATA / "text" / "tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    begin(args)

    base, tokenizer = load(args.model)
    tokens = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")).ids)
    tokens, unseen = tokens[: -len(tokens) // 10], windows(tokens[-len(tokens) // 10 :], 32, seed=0)
    before = held_out(base, unseen)

    models: dict[str, nn.Module] = {"full fine-tuning": copy.deepcopy(base)}
    for label, init in (("LoRA", "kaiming"), ("PiSSA", "pissa")):
        models[label] = lr.add_lora_(
            copy.deepcopy(base), r".*_proj", args.rank, 2 * args.rank, init=init, name="shakespeare", seed=0
        )
    curves, rows = {}, [("base", 0, before, 0.0)]
    for label, model in models.items():
        learning = [p for p in model.parameters() if p.requires_grad]
        start = time.perf_counter()
        curves[label] = train(model, learning, tokens, args.steps, args.batch, label)
        rows.append((label, sum(p.numel() for p in learning), held_out(model, unseen), time.perf_counter() - start))

    print(f"\n{'':18}{'trained':>12}{'held-out loss':>16}{'seconds':>10}")
    for label, trained, loss, seconds in rows:
        print(f"{label:18}{trained:>12,}{loss:>16.3f}{seconds:>10.1f}")

    tuned = models["PiSSA"]
    with lr.lora_disabled(tuned):
        print(f"\nPiSSA disabled is the base to the bit: {held_out(tuned, unseen) == before}")
    lr.save_lora(tuned, args.out / "adapter")
    again = lr.load_lora(copy.deepcopy(base), args.out / "adapter")
    print(f"saved and loaded: held-out loss {held_out(again, unseen):.3f}")
    lr.merge_lora_(tuned)
    print(f"merged: held-out loss {held_out(tuned, unseen):.3f}")
    print(f"\n{generate(tuned, tokenizer, 'KING RICHARD:')}")
    print(f"\nadapter: {args.out / 'adapter'}")
    save(plot.losses(curves), args.out / "06_lora.png")


if __name__ == "__main__":
    main()
