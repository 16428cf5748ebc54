"""Time, memory, mixed batches and recompilations of LoRA, beside PEFT and the frozen layer alone."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_layers as lr

from .common import arguments, machine, markdown_table, paired, write_result
from .vision import import_torchvision

CASES = [(1024, 8), (4096, 64), (4096, 8)]
TOKENS = 512
ROWS, ADAPTERS = 32, 16


def peft() -> Any:
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    import peft as library

    return library


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Gives all adapters products that are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(".B") or "lora_B." in name:
            parameter.normal_(std=0.02)
    return model


def ours(layer: nn.Module, rank: int, names: Sequence[str] = ("default",)) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer))
    for name in names:
        lr.add_lora_(model, rank=rank, alpha=2 * rank, name=name)
    return filled(model)


def theirs(layer: nn.Module, rank: int, names: Sequence[str] = ("default",)) -> Any:
    library = peft()
    config = library.LoraConfig(target_modules=["0"], r=rank, lora_alpha=2 * rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    return filled(model)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps from forward to backward: each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(kept.values())


def speed_rows(width: int, rank: int, args: argparse.Namespace) -> list[list[object]]:
    layer = nn.Linear(width, width).requires_grad_(False)
    models = {"frozen nn.Linear": nn.Sequential(layer), "ours": ours(layer, rank), "PEFT": theirs(layer, rank)}
    return timed_rows(models, width, rank, width, args)


def timed_rows(
    models: dict[str, nn.Module], width: int, rank: int, out: int, args: argparse.Namespace
) -> list[list[object]]:
    x, gradient = torch.randn(args.tokens, width), torch.randn(args.tokens, out)
    leaf = x.clone().requires_grad_()

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(args.repeat):
                model(x)

    def both(model: nn.Module) -> None:
        for _ in range(args.repeat):
            model(leaf).backward(gradient)

    first = paired([lambda model=model: forward(model) for model in models.values()], args.rounds)
    second = paired([lambda model=model: both(model) for model in models.values()], args.rounds)
    rows: list[list[object]] = []
    for k, (label, model) in enumerate(models.items()):
        cells = [f"{1e3 * seconds[k] / args.repeat:.2f} ({ratio[k]:.3f})" for seconds, ratio in (first, second)]
        rows.append([f"{width}, {rank}", label, *cells, f"{saved_bytes(model, leaf) / 2**20:.2f}"])
    return rows


@torch.no_grad()
def mixed_rows(width: int, rank: int, tokens: int, args: argparse.Namespace) -> list[list[object]]:
    layer = nn.Linear(width, width).requires_grad_(False)
    names = [f"task{k}" for k in range(ADAPTERS)]
    shape = (ROWS, width) if tokens == 1 else (ROWS, tokens, width)
    x, rows = torch.randn(shape), [names[k % ADAPTERS] for k in range(ROWS)]
    base, own, peer = nn.Sequential(layer), ours(layer, rank, names), theirs(layer, rank, names).eval()
    for name, adapter in own[0].lora_weight.adapters.items():
        adapter.A.copy_(peer.base_model.model[0].lora_A[name].weight)
        adapter.B.copy_(peer.base_model.model[0].lora_B[name].weight)
    count = args.repeat * max(1, 4096 // (tokens * ROWS))
    with lr.lora_rows(own, rows):
        difference = float((own(x) - peer(x, adapter_names=rows)).abs().max())

        def repeat(call: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(count):
                    call()

            return run

        calls = [lambda: base(x), lambda: own(x), lambda: peer(x, adapter_names=rows)]
        seconds, ratios = paired([repeat(call) for call in calls], args.rounds)
    cells = [f"{1e6 * s / count:.0f} ({r:.2f})" for s, r in zip(seconds, ratios, strict=True)]
    return [[f"{width}, {rank}, {tokens}", *cells, f"{difference:.0e}"]]


def recompiles(model: nn.Module, changes: Sequence[Callable[[], object]]) -> int:
    """Number of graphs compiled after the first call, over all changes."""
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend=backend), torch.randn(4, 32)
    compiled(x)
    before = count
    for change in changes:
        change()
        compiled(x)
    return count - before


def recompile_rows() -> list[list[object]]:
    layer, names = nn.Linear(32, 32).requires_grad_(False), ["a", "b", "c", "d"]
    own, peer = ours(layer, 2, names).requires_grad_(False), theirs(layer, 2, names).requires_grad_(False)
    lr.use_adapter(own, "a")
    peer_layer = peer.base_model.model[0]
    cycle = ["b", "c", "d", "a"]
    switching = (
        recompiles(own, [lambda n=n: lr.use_adapter(own, n) for n in cycle]),
        recompiles(peer, [lambda n=n: peer.set_adapter(n) for n in cycle]),
    )
    scales = [1.5, 1.25, 1.125, 0.5]
    scaling = (
        recompiles(own, [lambda s=s: own[0].lora_weight.adapters["a"].scaling.fill_(s) for s in scales]),
        recompiles(peer, [lambda s=s: peer_layer.set_scale("a", s) for s in scales]),
    )
    merging = (
        recompiles(own, [lambda: lr.merge_lora_(own), lambda: lr.unmerge_lora_(own)] * 2),
        recompiles(peer, [peer.merge_adapter, peer.unmerge_adapter] * 2),
    )
    return [
        ["four switches of the adapter", *switching],
        ["four changes of the scale", *scaling],
        ["merge, unmerge, merge, unmerge", *merging],
    ]


class Projections(nn.Module):
    """Query, key and value, which read the same tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width).requires_grad_(False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def dropout_rows(width: int, rank: int, args: argparse.Namespace) -> list[list[object]]:
    base = Projections(width)
    names = [name for name, _ in base.named_children()]
    own = filled(lr.add_lora_(copy.deepcopy(base), names, rank, 2 * rank, dropout=0.05))
    config = peft().LoraConfig(target_modules=names, r=rank, lora_alpha=2 * rank, lora_dropout=0.05)
    peer = filled(peft().get_peft_model(copy.deepcopy(base), config)).train()
    return timed_rows({"frozen": base, "ours": own, "PEFT": peer}, width, rank, 3 * width, args)


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and which labels are odd."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = torch.tensor(data.target)
    return torch.tensor(data.data).float() / 16, labels, labels % 2 == 1


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


def pretrained(seed: int, args: argparse.Namespace) -> nn.Sequential:
    """An MLP 64-128-16 that knows the odd digits."""
    x, y, odd = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    train(model, torch.optim.Adam(model.parameters(), lr=3e-3), x[odd], y[odd], 10 if args.smoke else 1000)
    return model


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
RATES = {"Adam": (1e-3, 3e-3, 1e-2, 3e-2), "SGD": (1e-2, 3e-2, 1e-1)}


def init_rows(args: argparse.Namespace) -> list[list[object]]:
    """The loss after 50 steps on the even digits, for every init and learning rate."""
    (x, y, odd), seeds, steps = digits(), range(1 if args.smoke else 5), 2 if args.smoke else 50
    bases = [pretrained(seed, args) for seed in seeds]
    before = [model(x).detach() for model in bases]
    rows: list[list[object]] = []
    for kind, rates in RATES.items():
        losses: dict[tuple[str, float], float] = {}
        inits = ("kaiming", "olora", "pissa", "LoRA-GA")
        for init in inits:
            same = True
            for rate in rates:
                found = []
                for seed, base, out in zip(seeds, bases, before, strict=True):
                    gradients = lr.weight_gradients(base, [(x[~odd], y[~odd])], F.cross_entropy)
                    model = copy.deepcopy(base)
                    start = lr.LoRAGA(gradients) if init == "LoRA-GA" else init
                    lr.add_lora_(model, rank=8, alpha=8, init=start, seed=seed)
                    optimizer = OPTIMIZERS[kind](lr.lora_parameters(model), lr=rate)
                    found.append(train(model, optimizer, x[~odd], y[~odd], steps))
                    with lr.lora_disabled(model):
                        same &= torch.equal(model(x), out)
                losses[init, rate] = statistics.median(found)
            cells = [f"{losses[init, rate]:.3f} ({losses['kaiming', rate] / losses[init, rate]:.1f})" for rate in rates]
            best = min(losses[init, rate] for rate in rates)
            gain = min(losses["kaiming", rate] for rate in rates) / best
            rows.append([kind, init, *cells, *[""] * (4 - len(rates)), f"{best:.3f} ({gain:.1f})", same])
    return rows


def extraction_rows(args: argparse.Namespace) -> list[list[object]]:
    """The fraction of a full fine-tune's gain in loss that the extracted adapters keep."""
    (x, y, odd), rows = digits(), []
    ranks = (1, 2, 4, 8)
    for steps in (5,) if args.smoke else (50, 300):
        found: dict[int, list[tuple[float, float]]] = {rank: [] for rank in ranks}
        for seed in range(1 if args.smoke else 5):
            base = pretrained(seed, args)
            tuned = copy.deepcopy(base)
            end = train(tuned, torch.optim.Adam(tuned.parameters(), lr=3e-3), x[~odd], y[~odd], steps)
            with torch.no_grad():
                start = float(F.cross_entropy(base(x[~odd]), y[~odd]))
            for rank in ranks:
                extracted = lr.extract_lora(base, tuned, rank=rank)
                with torch.no_grad():
                    reached = float(F.cross_entropy(extracted.apply_(copy.deepcopy(base))(x[~odd]), y[~odd]))
                energy = min(each.energy for each in extracted.values())
                found[rank].append(((start - reached) / (start - end), energy))
        for rank, pairs in found.items():
            shares, energies = zip(*pairs, strict=True)
            rows.append([steps, rank, f"{min(shares):.2%}", f"{statistics.median(shares):.2%}", f"{min(energies):.1%}"])
    return rows


def run(args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    args.tokens, args.rounds, args.repeat = (8, 2, 1) if args.smoke else (TOKENS, 30, 1)
    cases = [(32, 2), (64, 4)] if args.smoke else CASES
    speed = [row for width, rank in cases for row in speed_rows(width, rank, args)]
    width, rank = (32, 2) if args.smoke else (1024, 8)
    dropped = dropout_rows(width, rank, args)
    mixed = [row for tokens in (1, 16) for row in mixed_rows(width, rank, tokens, args)]
    return "\n\n".join(
        [
            "CPU seconds of the process, medians of runs in turn; in brackets the median ratio to the frozen layer.",
            "## One adapter",
            f"{args.tokens} tokens, fp32. Backward includes the gradient of the input, as inside a deep network. Saved:"
            " what autograd keeps for the backward pass, every storage once, parameters not counted.",
            markdown_table(["n, r", "layer", "forward, ms", "forward + backward, ms", "saved, MiB"], speed),
            "## Query, key and value with dropout 0.05",
            "Each layer draws its own mask, in PEFT as here.",
            markdown_table(["n, r", "layers", "forward, ms", "forward + backward, ms", "saved, MiB"], dropped),
            "## A batch of many adapters",
            f"{ROWS} rows, {ADAPTERS} adapters, forward.",
            markdown_table(["n, r, tokens per row", "frozen, us", "ours, us", "PEFT, us", "largest difference"], mixed),
            "## Recompiles",
            "Graphs compiled anew by a compiled model.",
            markdown_table(["change", "ours", "PEFT"], recompile_rows()),
            "## Starting from singular vectors",
            "An MLP 64-128-16 that knows the odd digits (scikit-learn's, 8 x 8) learns the even ones with adapters of"
            " rank 8 (the setting of Meng et al., 2024): cross entropy after 50 steps, full batch, medians of five"
            " seeds; in brackets kaiming's loss over it.",
            markdown_table(
                [
                    "optimizer",
                    "init",
                    *("lr " + ", ".join(f"{r[k]:g}" for r in RATES.values() if k < len(r)) for k in range(4)),
                    "best",
                    "disabled is the base to the bit",
                ],
                init_rows(args),
            ),
            "## Extracting adapters from a full fine-tune",
            "The same model, all of it trained on the even digits (Adam, 3e-3): the share of its gain in loss that the"
            " extracted adapters have, lowest and median of five seeds.",
            markdown_table(["steps", "r", "lowest", "median", "least energy kept"], extraction_rows(args)),
        ]
    )


def main() -> None:
    parser = arguments(__doc__, threads=1)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, seconds")
    args = parser.parse_args()
    peft()
    text = f"# LoRA\n\n{machine(args, 'peft')}\n\n{run(args)}"
    print(text)
    print(f"\nwritten to {write_result(args, 'lora', text)}")


if __name__ == "__main__":
    main()
