"""``lowrank diff``: what changed between two checkpoints, and of what rank the changes are."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import LowRankError
from ..linalg import check_tensor
from ..spectrum import MatrixSpectrum
from ..spectrum.table import percent, shown
from .arguments import add_names, chosen
from .display import print_json, print_table, track

EXAMPLES = """examples:
  lowrank diff base.safetensors tuned.safetensors
  lowrank diff BASE_FOLDER TUNED_FOLDER --include mlp --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("base", type=Path, help="file or folder of weights")
    parser.add_argument("tuned", type=Path, help="file or folder of weights to compare with it")
    add_names(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the changes.

    Args:
        args: the arguments.
    """
    base, tuned = Checkpoint(args.base), Checkpoint(args.tuned)
    names = chosen({**base, **tuned}, args)
    shared = [name for name in names if name in base and name in tuned]
    if not shared:
        raise LowRankError(f"{args.base} and {args.tuned} have no name in common: two models of other names.")
    reshaped = {n: [base[n].shape, tuned[n].shape] for n in shared if base[n].shape != tuned[n].shape}
    changed = {}
    for name in track([name for name in shared if name not in reshaped], "differences"):
        found = change_of(base.read(name), tuned.read(name), name)
        if found is not None:
            changed[name] = found
    same = len(shared) - len(changed) - len(reshaped)
    only = {"base": [n for n in names if n not in tuned], "tuned": [n for n in names if n not in base]}
    if args.json:
        print_json({"changed": changed, "same": same, "shapes": reshaped, "only": only})
        return
    rows = []
    for name, each in changed.items():
        ranks = (str(each[key]) if key in each else "" for key in ("rank_90", "rank_99"))
        size = "" if each["change"] is None else percent(each["change"])
        rows.append((name, size, shown(each.get("stable_rank")), *ranks))
    head = ("tensor", "relative change", "stable rank", "rank for 90%", "rank for 99%")
    print_table(f"{len(changed)} tensors changed, {same} are the same", head, rows)
    for name, shapes in reshaped.items():
        print(f"{name}: {' and '.join(map(str, shapes))}")
    for where, own in only.items():
        for name in own:
            print(f"{name}: only in {getattr(args, where)}")


def change_of(old: Tensor, new: Tensor, name: str) -> dict[str, float | None] | None:
    """Returns the size of a change relative to the old values and, of a matrix, its ranks; ``None`` without a change.

    Args:
        old: values before.
        new: values after, of the same shape.
        name: the tensor, for messages.
    """
    if torch.equal(old, new):
        return None
    change = new.double() - old.double()
    size = float(torch.linalg.vector_norm(old.double()))
    found: dict[str, float | None] = {"change": float(torch.linalg.vector_norm(change)) / size if size else None}
    if change.ndim > 1:
        spectrum = MatrixSpectrum.of(check_tensor(change, f"the change of {name!r}").flatten(1))
        found["stable_rank"] = spectrum.stable_rank
        found |= {f"rank_{round(100 * e)}": spectrum.rank_for_energy(e) for e in (0.9, 0.99)}
    return found
