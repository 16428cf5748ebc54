"""``lowrank apply``: a checkpoint with the factors of a plan, as a file for lr.load or a folder for transformers."""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..checkpoint import KEY, VERSION, Checkpoint
from ..checkpoint.write_model import copy_small_files
from ..compress import Plan
from ..compress.build import build_layer
from ..compress.method import factored_like
from ..compress.registry import DENSE
from ..errors import LowRankError
from ..files import TensorInfo, check_folder, check_writable
from ..layers import FactoredModule
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
  lowrank apply FOLDER SMALL_FOLDER --budget 0.5
  lowrank apply FOLDER SMALL_FOLDER --budget 0.8 --text calibration.txt
then, in Python:
  model = lr.load("small.safetensors", into=build_dense_model())
  model = AutoModel.from_pretrained("SMALL_FOLDER")  # after import lowrank_layers
Without --text the weights alone decide, which loses more at the same size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("checkpoint", type=Path, help="file or folder of weights")
    parser.add_argument("out", type=Path, help="the .safetensors file to write, or a new folder, of transformers")
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
    as_folder = (args.checkpoint / "config.json").is_file() and args.out.suffix != ".safetensors"
    if as_folder:
        check_folder(args.out)
        if args.out.is_dir() and any(args.out.iterdir()):
            raise LowRankError(f"{args.out}: is not empty; give a new folder.")
    else:
        check_writable(args.out)
    checkpoint = Checkpoint(args.checkpoint)
    shared = dict(_tied(text, checkpoint) for text in args.tied)
    if args.plan is not None and (args.include or args.exclude):
        raise LowRankError("got --plan beside --include or --exclude; give these to lowrank plan.")
    plan = make_plan_of_file(checkpoint, args) if args.plan is None else Plan.load(args.plan)
    if as_folder:
        write_folder(checkpoint, plan, args.out, shared)
    else:
        write_planned(checkpoint, plan, args.out, shared)
    print_plan(plan, args)


def write_folder(checkpoint: Checkpoint, plan: Plan, out: Path, shared: dict[str, str]) -> None:
    """Writes a folder of transformers with the factorized model, the plan, and the small files beside the weights.

    Args:
        checkpoint: the dense one, in a folder of transformers.
        plan: what its layers become.
        out: the folder, which holds ``model.safetensors`` once it is complete.
        shared: names that are to be tied to others, with these.
    """
    description = ModelDescription({name: FactoredSpec.of(layer) for name, layer in _blanks(checkpoint, plan).items()})
    out.mkdir(exist_ok=True)
    copy_small_files(checkpoint.path, out, description)
    plan.save(out / "plan.json")
    write_planned(checkpoint, plan, out / "model.safetensors", shared)


def write_planned(checkpoint: Checkpoint, plan: Plan, out: Path, shared: dict[str, str]) -> None:
    """Writes the checkpoint that :func:`save` would write of the factorized model, layer by layer.

    Args:
        checkpoint: the dense one.
        plan: what its layers become.
        out: the file.
        shared: names that are to be tied to others, with these.
    """
    blanks, specs = _blanks(checkpoint, plan), plannable(checkpoint)
    infos = {name: info for name, info in checkpoint.items() if name.rpartition(".")[0] not in blanks}
    owner_of: dict[str, tuple[str, str]] = {}
    for name, layer in blanks.items():
        for key, tensor in layer.state_dict().items():
            infos[f"{name}.{key}"] = TensorInfo(tuple(tensor.shape), tensor.dtype)
            owner_of[f"{name}.{key}"] = name, key

    @lru_cache(maxsize=1)
    def built(name: str) -> dict[str, Tensor]:
        return build_layer(read_linear(checkpoint, name, specs[name]), plan[name], None, plan.damping).state_dict()

    def tensor_of(name: str) -> Tensor:
        if name in owner_of:
            owner, key = owner_of[name]
            return built(owner)[key]
        return checkpoint.read(name)

    layers = {name: FactoredSpec.of(layer) for name, layer in blanks.items()}
    header = {"version": VERSION, **ModelDescription(layers).to_json(), "shared": shared}
    write_streamed(out, infos, tensor_of, {KEY: json.dumps(header)})


def _blanks(checkpoint: Checkpoint, plan: Plan) -> dict[str, FactoredModule]:
    """The factored layers of a plan without values, by name; raises if the plan is for another checkpoint."""
    specs = plannable(checkpoint)
    blanks = {}
    for entry in plan:
        if entry.bits is not None:
            raise LowRankError(
                f"the plan stores {entry.name!r} in int8, which this command does not write; apply it in Python with"
                " factorize_, or plan without bits=."
            )
        if entry.method == DENSE:
            continue
        if entry.name not in specs:
            raise LowRankError(f"the plan has {entry.name!r}, which is no linear layer of {checkpoint.path}.")
        if specs[entry.name] != entry.layer:
            raise LowRankError(
                f"{entry.name!r}: the plan was made for {entry.layer}, the file has {specs[entry.name]}; plan anew."
            )
        blanks[entry.name] = factored_like(entry.built_by(), blank(entry.layer), entry.rank, entry.bias)
    return blanks


def _tied(text: str, checkpoint: Checkpoint) -> tuple[str, str]:
    alias, _, name = text.partition("=")
    if name not in checkpoint or alias in checkpoint:
        raise LowRankError(f"--tied: got {text!r}, expected NEW_NAME=NAME_IN_THE_FILE.")
    return alias, name
