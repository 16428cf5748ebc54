"""``lowrank spectrum``: norms, ranks and singular values of the weights of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import LowRankError
from ..files import TensorInfo
from ..linalg import check_tensor
from ..spectrum import MatrixSpectrum
from ..spectrum.table import shown
from .arguments import add_names, chosen
from .display import print_json, print_table, track

EXAMPLES = """examples:
  lowrank spectrum model.safetensors --include q_proj
  lowrank spectrum FOLDER --json > spectrum.json    (with all singular values)"""
HEAD = ("weight", "shape", "spectral", "nuclear", "Frobenius", "condition", "stable", "effective")
ENERGIES = (0.9, 0.95, 0.99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command.

    Args:
        parser: its parser.
    """
    parser.add_argument("checkpoint", type=Path, help="file or folder of weights")
    add_names(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the spectra.

    Args:
        args: the arguments.
    """
    checkpoint = Checkpoint(args.checkpoint)
    names = chosen(matrix_names(checkpoint), args)
    found = {name: read_spectrum(checkpoint, name) for name in track(names, "singular values")}
    if args.json:
        print_json({name: {**numbers(each), "values": each.values.tolist()} for name, each in found.items()})
        return
    rows = []
    for name, each in found.items():
        law = each.power_law
        norms = each.spectral_norm, each.nuclear_norm, each.frobenius_norm, each.condition_number
        ranks = *map(each.rank_for_energy, ENERGIES), each.gavish_donoho_rank, each.evbmf_rank
        sizes = map(shown, (*norms, each.stable_rank, each.effective_rank))
        alpha = shown(None if law is None else law.alpha)
        rows.append((name, "x".join(map(str, each.shape)), *sizes, *map(str, ranks), alpha))
    print_table("singular values", (*HEAD, "90%", "95%", "99%", "G-D", "EVBMF", "alpha"), rows)


def matrix_names(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the names of the tensors that have singular values: floating point, of two or more dimensions.

    Args:
        infos: shapes and dtypes by name.

    Raises:
        LowRankError: if there is none.
    """
    names = [n for n, info in infos.items() if len(info.shape) > 1 and info.dtype.is_floating_point and info.numel]
    if not names:
        raise LowRankError("the checkpoint has no floating point tensor of two or more dimensions.")
    return names


def read_spectrum(checkpoint: Checkpoint, name: str) -> MatrixSpectrum:
    """Returns the spectrum of a tensor as a matrix whose rows are its first dimension.

    Args:
        checkpoint: where it is.
        name: the tensor.

    Raises:
        LowRankError: if a value is not finite.
    """
    return MatrixSpectrum.of(check_tensor(checkpoint.read(name), f"{checkpoint.path}: {name}").flatten(1))


def numbers(found: MatrixSpectrum) -> dict[str, object]:
    """Returns what describes a spectrum, by name.

    Args:
        found: the spectrum.
    """
    law = found.power_law
    return {
        "shape": found.shape,
        "spectral_norm": found.spectral_norm,
        "nuclear_norm": found.nuclear_norm,
        "frobenius_norm": found.frobenius_norm,
        "stable_rank": found.stable_rank,
        "effective_rank": found.effective_rank,
        "rank_for_energy": {f"{fraction:g}": found.rank_for_energy(fraction) for fraction in ENERGIES},
        "gavish_donoho_rank": found.gavish_donoho_rank,
        "evbmf_rank": found.evbmf_rank,
        "alpha": None if law is None else law.alpha,
    }
