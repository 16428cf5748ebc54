"""``lowrank extract-lora``: the change that fine-tuning made, as an adapter that PEFT reads."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..errors import LowRankError
from ..files import TensorInfo, check_folder
from ..layers.config import Spec
from ..linalg import check_tensor
from ..lora import Extraction, extract_lora, save_lora
from ..lora.peft.keys import saved_modules
from ..rank import Budget, Rank, allocate
from ..spectrum import MatrixSpectrum
from ..spectrum.table import percent
from .arguments import add_names, add_size, chosen, rank_of
from .display import print_json, print_table, track
from .layers_in_file import is_embedding_name, linear_layers, owners_of, read_linear, set_values_, skeleton, tree
from .planning import total_cost

EXAMPLES = """examples:
  lowrank extract-lora BASE TUNED adapter/ --rank 16
  lowrank extract-lora BASE TUNED adapter/ --energy 0.9 --exclude lm_head
  lowrank extract-lora BASE TUNED adapter/ --budget 0.01
then, in Python:
  model = PeftModel.from_pretrained(base, "adapter/")    or    lr.load_lora(base, "adapter/")"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("base", type=Path, help="file or folder of weights before fine-tuning")
    parser.add_argument("tuned", type=Path, help="file or folder of weights after it")
    parser.add_argument("out", type=Path, help="folder of the adapter to write")
    add_size(parser, "the parameters of BASE, for all adapters together")
    add_names(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the adapter, and prints what it holds.

    Args:
        args: the arguments.
    """
    check_folder(args.out)
    pair = Pair(Checkpoint(args.base), Checkpoint(args.tuned))
    names = chosen(pair.owners, args)
    pair.check(names)
    specs = pair.adaptable(names)
    ranks = ranks_of(pair, list(specs), args)
    found = Extraction()
    for name in track(list(ranks), "adapters"):
        old, new = (tree({name: read_linear(each, name, specs[name])}) for each in (pair.base, pair.tuned))
        found |= extract_lora(old, new, ranks[name], target=[name])
    if not found:
        raise LowRankError("no linear layer changed among those that were compared; there is nothing to extract.")
    rest = [name for name in names if (name, "weight") not in found and any(map(pair.differs, pair.tensors(name)))]
    carried = [name for name in rest if name and name not in pair.parents]
    biased = any(pair.differs(f"{name}.bias") for name, _ in found)
    write_adapter(pair.tuned, found, carried, biased, args.out)
    _print(found, carried, [name for name in rest if name not in carried], args)


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one architecture, which are compared tensor by tensor.

    Args:
        base: the one before fine-tuning.
        tuned: the one after it.
    """

    base: Checkpoint
    tuned: Checkpoint

    @cached_property
    def owners(self) -> dict[str, dict[str, TensorInfo]]:
        """The modules of both checkpoints with their tensors."""
        return owners_of({**self.base, **self.tuned})

    @cached_property
    def parents(self) -> set[str]:
        """The names of modules that have modules inside, which an adapter cannot hold whole."""
        return {owner[:k] for owner in self.owners for k, letter in enumerate(owner) if letter == "."}

    def check(self, owners: Iterable[str]) -> None:
        """Raises if modules differ in names or shapes; vocabularies may have two sizes.

        Args:
            owners: names of the modules.
        """
        resized = [n for n in self.tuned if is_embedding_name(n.rpartition(".")[0]) and self._has_other_rows(n)]
        sizes = {(self.base[name].shape[0], self.tuned[name].shape[0]) for name in resized}
        for name in (name for owner in owners for name in self.tensors(owner)):
            for there, other in ((self.base, self.tuned), (self.tuned, self.base)):
                if name not in there:
                    raise LowRankError(
                        f"{name!r} is in {other.path}, but not in {there.path}; --exclude it if need be."
                    )
            old, new = self.base[name].shape, self.tuned[name].shape
            if old != new and not (self._has_other_rows(name) and (old[0], new[0]) in sizes):
                raise LowRankError(f"{name!r} has shape {old} in {self.base.path}, {new} in {self.tuned.path}.")

    def adaptable(self, owners: Iterable[str]) -> dict[str, Spec]:
        """Returns the settings of the linear layers of one shape whose weights differ, by name.

        Args:
            owners: names of modules.
        """
        specs, _ = linear_layers(self.base)
        return {owner: specs[owner] for owner in owners if owner in specs and self._has_new_values(f"{owner}.weight")}

    def differs(self, name: str) -> bool:
        """Returns whether a tensor changed.

        Args:
            name: the tensor, which may be missing in both.
        """
        return name in self.base and (self.base[name].shape != self.tuned[name].shape or self._has_new_values(name))

    def tensors(self, owner: str) -> list[str]:
        """Returns the full names of a module's tensors, in either checkpoint.

        Args:
            owner: name of the module.
        """
        return [f"{owner}.{key}" if owner else key for key in self.owners[owner]]

    def _has_new_values(self, name: str) -> bool:
        same_shape = self.base[name].shape == self.tuned[name].shape
        return same_shape and not torch.equal(self.base.read(name), self.tuned.read(name))

    def _has_other_rows(self, name: str) -> bool:
        old, new = (each[name].shape if name in each else () for each in (self.base, self.tuned))
        return len(old) == len(new) == 2 and old[0] != new[0] and old[1] == new[1]


def ranks_of(pair: Pair, names: Sequence[str], args: argparse.Namespace) -> dict[str, Rank]:
    """Returns the rank, or the rule, for each layer; under a budget what keeps most of the sum of squared changes.

    Args:
        pair: the checkpoints.
        names: layers that changed.
        args: arguments with a size.
    """
    rule = rank_of(args)
    if rule is not None:
        return dict.fromkeys(names, rule)
    limit = int(Budget(params=args.budget).limits(total_cost(pair.base))["params"])
    costs, losses = [], []
    for name in track(names, "singular values"):
        change = pair.tuned.read(f"{name}.weight").double() - pair.base.read(f"{name}.weight").double()
        energy = MatrixSpectrum.of(check_tensor(change, f"the change of {name!r}")).values.square()
        losses.append([*energy.flip(0).cumsum(0).flip(0).tolist(), 0.0])
        costs.append(range(0, sum(change.shape) * len(energy) + 1, sum(change.shape)))
    ranks = allocate(costs, losses, limit)
    return {name: rank for name, rank in zip(names, ranks, strict=True) if rank}


def write_adapter(tuned: Checkpoint, found: Extraction, carried: list[str], biased: bool, out: Path) -> None:
    """Writes a folder that PEFT and :func:`load_lora` read.

    Args:
        tuned: where the values of whole modules are.
        found: the low-rank changes.
        carried: names of the modules to write whole.
        biased: whether the biases of adapted layers changed.
        out: the folder.
    """
    model = skeleton(tuned)
    whole = set(saved_modules(model, carried))
    names = [name for name in tuned if name.rpartition(".")[0] in whole]
    names += [f"{owner}.bias" for owner, _ in found if biased and f"{owner}.bias" in tuned]
    set_values_(model, {name: tuned.read(name) for name in names})
    found.apply_(model)
    save_lora(model, out, modules_to_save=carried, bias="lora_only" if biased else "none")


def _print(found: Extraction, carried: list[str], left: list[str], args: argparse.Namespace) -> None:
    size = sum(each.a.numel() + each.b.numel() for each in found.values())
    if args.json:
        adapters = {
            owner: {"rank": each.rank, "change": each.change, "energy": each.energy}
            for (owner, _), each in found.items()
        }
        print_json({"adapters": adapters, "params": size, "carried": carried, "left": left})
        return
    rows = [(n, str(each.rank), percent(each.change), percent(each.energy)) for (n, _), each in found.items()]
    print_table(f"{size:,} parameters in adapters", ("layer", "rank", "relative change", "of it kept"), rows)
    for name in carried:
        print(f"{name}: written whole")
    for name in left:
        print(f"{name or 'the model itself'}: changed, but stays as in BASE: PEFT's file cannot hold its parameters")
