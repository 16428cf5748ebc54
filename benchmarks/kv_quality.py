"""Perplexity of a language model against the bytes of its key/value cache, for this and other ways to compress it.

Needs transformers (an extra) and ``pycode_llama`` in ``LOWRANK_DATA``; ``--smoke`` builds a small random model.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_layers as lr
from lowrank_layers.kv_cache.fit import grouped
from lowrank_layers.kv_cache.subspace import Scatter, Subspace

from .common import arguments, machine, markdown_table, write_result
from .data import ROOT, available
from .kv_driver import Driver, Prompt, prefilled
from .kv_stores import DTYPE, Evicting, Exact, FourBits, LowRank, Make, Quantized
from .stories import stories_model, stories_tokens
from .vision import import_torchvision

OURS = {
    "pycode_llama": ((14, 10, 32), (24, 20, 24), (16, 12, 64), (14, 10, 24), (12, 8, 32), (8, 6, 32)),
    "stories260K": ((5, 5, 32), (7, 7, 32), (6, 6, 32), (4, 4, 32), (3, 3, 32)),
}
"""Ranks of keys and values, and the number of recent tokens; the first row is varied below."""
BUDGETS = {"pycode_llama": ((0.22, 64), (0.16, 32), (0.14, 24)), "stories260K": ((0.5, 32), (0.35, 32))}
"""Fraction of the exact bytes, and the number of recent tokens."""
EVICTED = (110, 150, 200)


@dataclass
class Score:
    nats: float
    divergence: float
    nbytes: float
    log_probabilities: Tensor


@torch.no_grad()
def score(
    driver: Driver,
    windows: Tensor,
    prefix: Sequence[Prompt],
    make: Make,
    chunk: int,
    exact: Score | None,
) -> Score:
    """Scores the text after the prefix, ``chunk`` tokens per step, as in generation; also the mean bytes per row."""
    driver.stores = [make(layer) for layer in range(len(prefix))]
    for store, prompt in zip(driver.stores, prefix, strict=True):
        store.update(prompt.keys, prompt.values)
    start, found, held = prefix[0].keys.shape[2], [], []
    for at in range(start, windows.shape[1] - 1, chunk):
        step = windows[:, at : min(at + chunk, windows.shape[1] - 1)]
        found.append(driver.logits(step, at).log_softmax(-1))
        held.append(sum(store.nbytes() for store in driver.stores) / len(windows))
    own = torch.cat(found, 1)
    nats = -float(own.gather(-1, windows[:, start + 1 :, None]).mean())
    far = 0.0
    if exact is not None:
        each = F.kl_div(own, exact.log_probabilities, reduction="none", log_target=True)
        far = float(each.sum(-1).mean())
    return Score(nats, far, sum(held) / len(held), own)


def offline(
    driver: Driver, tokens: Tensor, rotation: lr.Rotation, rank: int, *, joint: bool, value_rank: int
) -> list[tuple[Subspace, Subspace]]:
    """Subspaces computed in advance from other text, with the rotation removed from keys."""
    found = []
    for prompt in prefilled(driver, tokens):
        together = prompt.keys.shape[1] if joint else 1
        keys = rotation.turn(prompt.keys.float(), -torch.arange(prompt.keys.shape[2]))
        sides = []
        for x, r in ((keys, rank), (prompt.values.float(), value_rank)):
            rows = grouped(x.transpose(0, 1).flatten(1, 2)[None], together)
            sides.append(Scatter.of(rows).fit(r * together, DTYPE))
        found.append((sides[0], sides[1]))
    return found


def load(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model, and tokens of a text that it was not trained on."""
    import_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if args.smoke:
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=args.window,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval(), torch.randint(64, (20 * args.window,))
    path = ROOT / args.model
    if not available(args.model, "text"):
        raise SystemExit(f"kv_quality: got no folder {args.model} in LOWRANK_DATA; see benchmarks/data.py.")
    if args.model == "stories260K":
        return stories_model(), stories_tokens(2 * args.windows * args.window)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = (path / "valid.txt").read_text(encoding="utf-8")
    return model, AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0]


def spread(tokens: Tensor, count: int, length: int) -> Tensor:
    """Evenly spaced windows; the settings above were chosen on windows between them."""
    step = (len(tokens) - length) // count
    return torch.stack([tokens[k * step + step // 2 :][:length] for k in range(count)])


class Bench:
    """A model, its text, and the caches of the prefix."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, tokens = load(args)
        config = self.model.config
        self.layers, self.chunk = config.num_hidden_layers, args.chunk
        self.driver = Driver(self.model)
        half = len(tokens) // 2
        self.training = spread(tokens[:half], args.windows, args.window)
        self.windows = spread(tokens[half:], args.windows, args.window)
        self.rotation = lr.Rotation(self.model.model.rotary_emb.inv_freq.float())
        self.prefix = prefilled(self.driver, self.windows[:, : 3 * args.window // 4])
        self.exact = score(self.driver, self.windows, self.prefix, lambda layer: Exact(), self.chunk, None)

    def ours(self, *, trained: bool = False, **settings: Any) -> Make:
        chosen = lr.KVSettings(**settings)
        given: list[Any] = [None] * self.layers
        if trained:
            rank, value_rank = (chosen.rank_of(values) for values in (False, True))
            assert isinstance(rank, int)
            assert isinstance(value_rank, int)
            given = list(
                offline(self.driver, self.training, self.rotation, rank, joint=chosen.joint, value_rank=value_rank)
            )
        return lambda layer: LowRank(chosen, self.rotation, given[layer])

    def row(self, label: str, make: Make) -> list[object]:
        found = score(self.driver, self.windows, self.prefix, make, self.chunk, self.exact)
        increase = 100 * math.expm1(found.nats - self.exact.nats)
        return [
            label,
            f"{found.nbytes / 1024:.1f}",
            f"{self.exact.nbytes / found.nbytes:.2f}",
            f"{math.exp(found.nats):.3f}",
            f"{increase:+.2f}",
            f"{1e4 * found.divergence:.1f}",
        ]


@torch.no_grad()
def served(model: Any, windows: Tensor, make: Callable[[], Any], chunk: int) -> tuple[Tensor, float]:
    """Log probabilities after the prompt and mean bytes of the cache; the model is called on one window at a time."""
    start, found, held = 3 * windows.shape[1] // 4, [], []
    for window in windows:
        cache, own = make(), []
        model(window[None, :start], past_key_values=cache)
        for at in range(start, len(window) - 1, chunk):
            step = window[None, at : min(at + chunk, len(window) - 1)]
            own.append(model(step, past_key_values=cache).logits.float().log_softmax(-1))
            tensors = cache.tensors() if isinstance(cache, lr.LowRankCache) else plain_tensors(cache)
            held.append(sum(t.nbytes for _, t in tensors))
        found.append(torch.cat(own, 1))
    return torch.cat(found), sum(held) / len(held)


def plain_tensors(cache: Any) -> list[tuple[str, Tensor]]:
    return [(name, getattr(layer, name)) for layer in cache.layers for name in ("keys", "values")]


def served_rows(args: argparse.Namespace, windows: Tensor, pairs: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Rows for the model in bfloat16 with ``lr.LowRankCache``, beside the same model with transformers' cache."""
    from transformers import DynamicCache

    model = load(args)[0].to(DTYPE)
    model.set_attn_implementation("sdpa")
    target = windows[:, 3 * windows.shape[1] // 4 + 1 :, None]
    exact, whole = served(model, windows, DynamicCache, args.chunk)
    nats = -float(exact.gather(-1, target).mean())
    rows: list[list[object]] = [
        ["DynamicCache", f"{whole / 1024:.1f}", "1.00", f"{math.exp(nats):.3f}", "+0.00", "0.0"]
    ]
    common = {"keep_first": 1, "block": 8, "dtype": torch.int8}
    makes: dict[str, Callable[[], Any]] = {
        f"LowRankCache, K {pair['rank']}, V {pair['value_rank']}, {pair['keep_recent']} recent": (
            lambda pair=pair: lr.LowRankCache(**pair)
        )
        for pair in pairs
    }
    for budget, recent in ((0.5, 16),) if args.smoke else BUDGETS[args.model]:
        makes[f"LowRankCache, budget {budget} at the prompt, {recent} recent"] = lambda budget=budget, recent=recent: (
            lr.LowRankCache(budget=budget, keep_recent=recent, **common)
        )
    model.set_attn_implementation("lowrank")
    for label, make in makes.items():
        own, held = served(model, windows, make, args.chunk)
        loss = -float(own.gather(-1, target).mean())
        far = float(F.kl_div(own, exact, reduction="none", log_target=True).sum(-1).mean())
        increase = 100 * math.expm1(loss - nats)
        cells = [f"{held / 1024:.1f}", f"{whole / held:.2f}", f"{math.exp(loss):.3f}", f"{increase:+.2f}"]
        rows.append([label, *cells, f"{1e4 * far:.1f}"])
    return rows


def run(args: argparse.Namespace) -> str:
    bench = Bench(args)
    exact = [
        "exact, bfloat16",
        f"{bench.exact.nbytes / 1024:.1f}",
        "1.00",
        f"{math.exp(bench.exact.nats):.3f}",
        "+0.00",
        "0.0",
    ]
    rows: list[list[object]] = [list(exact)]
    common: dict[str, Any] = {"dtype": torch.int8, "keep_first": 1, "block": 8}
    ours = OURS[args.model]
    pairs = [{"rank": k, "value_rank": v, "keep_recent": recent, **common} for k, v, recent in ours]
    for pair in pairs[:1] if args.smoke else sorted(pairs, key=lambda pair: -pair["rank"]):
        label = f"ours: K {pair['rank']}, V {pair['value_rank']}, {pair['keep_recent']} recent"
        rows.append(bench.row(label, bench.ours(**pair)))
    rank, value_rank, recent = ours[0]
    variants: dict[str, dict[str, Any]] = {
        "per head": {"joint": False},
        "after RoPE": {"rope": "after"},
        "bfloat16 coefficients": {"dtype": None},
        "16 recent": {"keep_recent": 16},
        "64 recent": {"keep_recent": 64},
        "4 first": {"keep_first": 4},
        "blocks of 64": {"block": 64},
        "never fitted again": {"refresh": None},
        "fitted again at every block": {"refresh": 1.0},
        "subspaces from other text": {"trained": True},
        f"subspaces from other text, K {4 * rank // 3}, V {4 * value_rank // 3}": {
            "trained": True,
            "rank": 4 * rank // 3,
            "value_rank": 4 * value_rank // 3,
        },
        "as Palu (other text, bfloat16, none exact)": {
            "trained": True,
            "dtype": None,
            "keep_recent": 0,
            "keep_first": 0,
        },
    }
    for label, changed in variants.items():
        rows.append(
            bench.row(f"K {rank}, V {value_rank}, {recent} recent, but {label}", bench.ours(**{**pairs[0], **changed}))
        )
    config = bench.model.config
    theirs: dict[str, Make] = {"transformers' QuantizedCache, fp8": lambda layer: Quantized(config, "fp8")}
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        theirs["transformers' QuantizedCache, quanto int4"] = lambda layer: Quantized(config, "quanto", nbits=4)
    theirs["int4 per token and head, 16 recent exact"] = lambda layer: FourBits(16)
    for kept in EVICTED:
        theirs[f"eviction: 4 first and {kept} recent"] = lambda layer, kept=kept: Evicting(kept)
    rows += [bench.row(label, make) for label, make in theirs.items()]
    tokens = 3 * args.window // 4
    head = ["cache", "KiB per sequence", "bytes saved", "perplexity", "increase, %", "KL from exact, 1e-4"]
    return "\n\n".join(
        [
            f"{'A small random Llama' if args.smoke else f'{args.model} on unseen text'}: {args.windows} windows of"
            f" {args.window}, {tokens} tokens of prompt and the rest scored, {args.chunk} tokens per step, so that"
            " tokens leave the recent ones and are compressed as in generation. Arithmetic in fp32, exact keys and"
            " values in bfloat16. Bytes: all that a cache stores (coefficients, scales, bases, means, exact tokens, and"
            " room for more), the mean over the steps, all layers; subspaces from other text (the other half of it)"
            f" are shared by the {args.windows} sequences and counted once for them. In a context this short the bases"
            " and the recent tokens are a third of the bytes.",
            "Ours, if nothing else is said: heads joint, before RoPE, int8, 1 first token exact, blocks of 8.",
            markdown_table(head, rows),
            "## The same through the model's own call",
            "`model(tokens, past_key_values=cache)` in bfloat16 with the attention `lowrank`, every window by itself. A"
            " budget is shared over layers, keys and values by the error that a byte saves.",
            markdown_table(head, served_rows(args, bench.windows, pairs[:1] if args.smoke else pairs)),
        ]
    )


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="a random model, seconds")
    parser.add_argument("--model", choices=OURS, default="pycode_llama")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument(
        "--window",
        type=int,
        default=None,
        help="tokens per window; by default the length of training",
    )
    parser.add_argument("--chunk", type=int, default=8, help="tokens per step; 1 is exactly generation")
    args = parser.parse_args()
    args.window = args.window or {"pycode_llama": 1024, "stories260K": 512}[args.model]
    if args.smoke:
        args.windows, args.window = 2, 256
    torch.set_num_threads(args.threads)
    text = f"# Quality of a low-rank cache\n\n{machine(args, 'transformers')}\n\n{run(args)}"
    name = "kv_quality" if args.model == "pycode_llama" else "kv_quality_stories"
    print(text)
    print(f"\nwritten to {write_result(args, name, text)}")


if __name__ == "__main__":
    main()
