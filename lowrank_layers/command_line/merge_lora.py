"""``lowrank merge-lora``: a checkpoint with an adapter added to its weights."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, LowRankError
from ..files import TensorInfo, check_folder, check_writable
from ..lora.adapter import Adapter, Bank
from ..lora.adapter_file import AdapterFile, LoadedAdapter
from ..lora.load import read_adapter_file
from ..lora.peft.keys import OLD_WEIGHTS, PREFIX, WEIGHTS
from .display import print_json
from .layers_in_file import skeleton
from .streamed_file import write_streamed

EXAMPLES = """examples:
  lowrank merge-lora base.safetensors adapter/ merged.safetensors
  lowrank merge-lora BASE_FOLDER adapter/ MERGED_FOLDER    (with config and tokenizer)"""
_EMBEDDING = ".lora_embedding_A"
_SMALL = (".json", ".txt", ".model", ".jinja", ".py")
"""Endings of what is copied from the folder of the base: everything but weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("base", type=Path, help="file or folder of weights")
    parser.add_argument("adapter", type=Path, help="folder of PEFT or lr.save_lora, or a file of diffusers or kohya")
    parser.add_argument("out", type=Path, help="the .safetensors file to write, or a folder where BASE is one")


def run(args: argparse.Namespace) -> None:
    """Writes the merged checkpoint.

    Args:
        args: the arguments.
    """
    in_folder = args.base.is_dir() and args.out.suffix != ".safetensors"
    if in_folder:
        check_folder(args.out)
        if args.out.exists() and any(args.out.iterdir()):
            raise CheckpointError(f"{args.out}: is not empty; give a new folder.")
    else:
        check_writable(args.out)
    base = Checkpoint(args.base)
    adapter = _tensors_of(args.adapter)
    # a module that the adapter holds whole may have other rows: a larger vocabulary
    infos = {name: TensorInfo(_shape(adapter, name, info), info.dtype) for name, info in base.items()}
    embeddings = [key.removeprefix(PREFIX).removesuffix(_EMBEDDING) for key in adapter if key.endswith(_EMBEDDING)]
    file = read_adapter_file(skeleton(infos, embeddings), args.adapter, "merged")
    merge = Merge(base, file, args.adapter)
    if in_folder:
        _write_folder(base, infos, merge, args.out)
    else:
        write_streamed(args.out, infos, merge, {})
    counts = {"merged": len(merge.adapters), "replaced": len(merge.replaced), "tensors": len(infos)}
    if args.json:
        print_json(counts)
    else:
        print("{merged} adapters merged, {replaced} tensors replaced, of {tensors} tensors".format(**counts))


class Merge:
    """The tensors of the merged checkpoint, each computed when it is asked for.

    Args:
        base: the checkpoint that the adapter belongs to.
        file: the adapter, as it was read for the names of the base.
        path: where it comes from, for messages.

    Raises:
        LowRankError: for an adapter that is no part of the weights.
    """

    def __init__(self, base: Checkpoint, file: AdapterFile, path: Path) -> None:
        if file.tokens:
            raise LowRankError(f"{path}: trains single tokens, which are merged in Python only: lr.merge_lora_.")
        mixed = [loaded.weight.name for loaded in file.adapters if loaded.mixes_groups]
        if mixed:
            raise LowRankError(f"{path}: the adapter of {mixed[0]!r} mixes the groups of a convolution.")
        self.base = base
        self.adapters = {loaded.weight.name: loaded for loaded in file.adapters}
        self.biases = {f"{each.weight.owner}.bias": each for each in file.adapters if each.bias is not None}
        missing = [name for name in self.biases if name not in base]
        if missing:
            raise LowRankError(f"{path}: has a bias for {missing[0]!r}, which {base.path} has not.")
        places = file.base | file.copied | file.embeddings
        self.replaced = {place: file.tensors[key] for key, place in places.items()}

    def __call__(self, name: str) -> Tensor:
        """Returns one tensor."""
        tensor = self.replaced.get(name)
        tensor = self.base.read(name) if tensor is None else tensor.to(self.base[name].dtype)
        if name in self.adapters:
            tensor = merged(tensor, self.adapters[name])
        bias = self.biases[name].bias if name in self.biases else None
        return tensor if bias is None else (tensor.float() + bias.float()).to(tensor.dtype)


@torch.no_grad()
def merged(weight: Tensor, loaded: LoadedAdapter) -> Tensor:
    """Returns a weight with an adapter, computed in fp32 or wider and rounded once.

    Args:
        weight: the base weight.
        loaded: its adapter.
    """
    bank = Bank(loaded.weight.layout)
    bank.add("merged", Adapter(loaded.a, loaded.b, scaling=loaded.scaling, magnitude=loaded.magnitude))
    return bank.effective(weight.to(torch.promote_types(weight.dtype, torch.float32))).to(weight.dtype)


def _tensors_of(adapter: Path) -> Checkpoint:
    """What is in the adapter's file of weights."""
    if not adapter.is_dir():
        return Checkpoint(adapter)
    return Checkpoint(next((adapter / n for n in (WEIGHTS, OLD_WEIGHTS) if (adapter / n).is_file()), adapter / WEIGHTS))


def _shape(adapter: Checkpoint, name: str, info: TensorInfo) -> tuple[int, ...]:
    whole = adapter.get(PREFIX + name, info).shape
    return whole if whole[1:] == info.shape[1:] and len(whole) == 2 else info.shape


def _write_folder(base: Checkpoint, infos: dict[str, TensorInfo], merge: Merge, out: Path) -> None:
    """Writes a folder like that of the base, under a temporary name first."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        write_streamed(temporary / "model.safetensors", infos, merge, {})
        for file in base.path.iterdir():
            if file.is_file() and file.suffix in _SMALL and not file.name.endswith(".index.json"):
                shutil.copy2(file, temporary / file.name)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
