"""``lowrank apply``: a checkpoint with the factors of a plan, which lr.load reads into the dense class."""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..checkpoint import KEY, VERSION, Checkpoint
from ..compress import Plan
from ..compress.build import build_layer
from ..compress.method import factored_like
from ..compress.registry import DENSE
from ..errors import LowRankError
from ..files import TensorInfo, check_writable
from ..layers.config import FactoredSpec, blank
from ..modules import ModelDescription
from .apply_with_text import add_text, apply_with_text
from .arguments import add_names, add_size
from .layers_in_file import read_linear
from .plan import make_plan_of_file, print_plan
from .planning import plannable
from .streamed_file import write_streamed

EXAMPLES = """examples:
  lowrank apply model.safetensors small.safetensors --budget 0.5
  lowrank apply model.safetensors small.safetensors --plan plan.json
  lowrank apply FOLDER SMALL_FOLDER --budget 0.8 --text calibration.txt
then, in Python:
  model = lr.load("small.safetensors", into=build_dense_model())
Without --text the weights alone decide, which loses more at the same size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("checkpoint", type=Path, help="file or folder of weights")
    parser.add_argument("out", type=Path, help="the .safetensors file to write, or with --text the folder")
    size = add_size(parser, "the checkpoint")
    size.add_argument("--plan", type=Path, help="plan that lowrank plan, or Plan.save, wrote")
    add_names(parser)
    text = "a name that the model has for a tensor of the file, as lm_head.weight=model.embed_tokens.weight"
    add_text(parser)
    parser.add_argument("--tied", metavar="ALIAS=NAME", action="append", default=[], help=text)


def run(args: argparse.Namespace) -> None:
    """Writes the compressed checkpoint, and prints its plan.

    Args:
        args: the arguments.
    """
    if args.text is not None:
        if args.plan is not None:
            raise LowRankError("got --plan beside --text, which makes a plan of its own.")
        print_plan(apply_with_text(args), args)
        return
    check_writable(args.out)
    checkpoint = Checkpoint(args.checkpoint)
    shared = dict(_tied(text, checkpoint) for text in args.tied)
    if args.plan is not None and (args.include or args.exclude):
        raise LowRankError("got --plan beside --include or --exclude; give these to lowrank plan.")
    plan = make_plan_of_file(checkpoint, args) if args.plan is None else Plan.load(args.plan)
    write_planned(checkpoint, plan, args.out, shared)
    print_plan(plan, args)


def write_planned(checkpoint: Checkpoint, plan: Plan, out: Path, shared: dict[str, str]) -> None:
    """Writes the checkpoint that :func:`save` would write of the factorized model, layer by layer.

    Args:
        checkpoint: the dense one.
        plan: what its layers become.
        out: the file.
        shared: names that are to be tied to others, with these.
    """
    specs = plannable(checkpoint)
    entries = {entry.name: entry for entry in plan if entry.method != DENSE}
    unknown = [name for name in entries if name not in specs]
    if unknown:
        raise LowRankError(f"the plan has {unknown[0]!r}, which is no linear layer of {checkpoint.path}.")
    infos = {name: info for name, info in checkpoint.items() if name.rpartition(".")[0] not in entries}
    layers: dict[str, FactoredSpec] = {}
    owner_of: dict[str, tuple[str, str]] = {}
    for name, entry in entries.items():
        if specs[name] != entry.layer:
            raise LowRankError(f"{name!r}: the plan was made for {entry.layer}, the file has {specs[name]}; plan anew.")
        blank_layer = factored_like(entry.built_by(), blank(entry.layer), entry.rank, entry.bias)
        layers[name] = FactoredSpec.of(blank_layer)
        for key, tensor in blank_layer.state_dict().items():
            infos[f"{name}.{key}"] = TensorInfo(tuple(tensor.shape), tensor.dtype)
            owner_of[f"{name}.{key}"] = name, key

    @lru_cache(maxsize=1)
    def built(name: str) -> dict[str, Tensor]:
        return build_layer(read_linear(checkpoint, name, specs[name]), entries[name], None, plan.damping).state_dict()

    def tensor_of(name: str) -> Tensor:
        if name in owner_of:
            owner, key = owner_of[name]
            return built(owner)[key]
        return checkpoint.read(name)

    header = {"version": VERSION, **ModelDescription(layers).to_json(), "shared": shared}
    write_streamed(out, infos, tensor_of, {KEY: json.dumps(header)})


def _tied(text: str, checkpoint: Checkpoint) -> tuple[str, str]:
    alias, _, name = text.partition("=")
    if name not in checkpoint or alias in checkpoint:
        raise LowRankError(f"--tied: got {text!r}, expected NEW_NAME=NAME_IN_THE_FILE.")
    return alias, name
