"""The directions in which training moves the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..drawing import colour, figure_of, ink, legend, panels, whole_x
from ..errors import LowRankError
from ..linalg import check_tensor, full_precision
from .matrix_spectrum import MatrixSpectrum
from .table import percent, shown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Checkpoint = nn.Module | Mapping[str, Tensor]
"""A model, or its state dict."""


@dataclass(frozen=True, eq=False)
class TrajectorySpectrum:
    """What :func:`trajectory_spectrum` found; it prints as a table.

    Args:
        spectrum: singular values of the differences from the first checkpoint, a matrix with one row per later
            checkpoint and one column per parameter.
        projections: the differences in the basis of the directions, ``[checkpoints - 1, directions]``; the first two
            columns draw the path of training.
        changes: by name, the spectrum of the last value of each parameter of two dimensions or more minus the first.
    """

    spectrum: MatrixSpectrum
    projections: Tensor
    changes: dict[str, MatrixSpectrum]

    @property
    def explained(self) -> Tensor:
        """Fraction of the sum of squared differences that each direction holds."""
        energy = self.spectrum.values.square()
        return energy / energy.sum()

    def directions_for(self, fraction: float) -> int:
        """Returns how many directions hold a fraction of the squared differences.

        Args:
            fraction: in (0, 1].
        """
        return self.spectrum.rank_for_energy(fraction)

    def __str__(self) -> str:
        count, parameters = self.spectrum.shape
        first = f"{count} steps of {parameters:,} parameters: {self.directions_for(0.99)} directions hold 99 %"
        parts = [f"{k + 1}: {percent(float(part))}" for k, part in enumerate(self.explained[:5])]
        rows = [
            (
                *(name, "x".join(map(str, each.shape)), shown(each.frobenius_norm), shown(each.stable_rank)),
                *(str(each.rank_for_energy(fraction)) for fraction in (0.9, 0.99)),
            )
            for name, each in self.changes.items()
        ]
        head = ("change of", "shape", "Frobenius", "stable", "90%", "99%")
        return f"{first} ({', '.join(parts)})\n{table(head, rows)}"

    def plot(self) -> Figure:
        """Plots the part of the squared differences that the first directions hold, and the path in the first two.

        Raises:
            MissingExtraError: if matplotlib is not installed.
        """
        held = self.explained.cumsum(0).tolist()
        most = self.directions_for(0.99)
        left, right = panels(2)
        few = held[: max(10, 2 * most)]
        left.plot(range(1, len(few) + 1), few, "o-", color=colour(0), markersize=4)
        left.axvline(most, color=colour(1), linestyle="--", label=f"99 %: {most} of {len(held)} directions")
        left.set(xlabel="directions", ylabel="squared differences held", ylim=(0, 1.04), title="Directions of training")
        left.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        whole_x(left)
        legend(left)
        path = torch.zeros(len(self.projections) + 1, 2, dtype=torch.float64)
        path[1:, : self.projections.shape[1]] = self.projections[:, :2]
        right.plot(*path.T.tolist(), "o-", color=colour(0), markersize=4)
        for place, marker, label in ((0, "s", "first checkpoint"), (-1, "*", "last checkpoint")):
            right.plot(*path[place].tolist(), marker, color=ink(), markersize=10, label=label)
        shares = [*map(percent, self.explained[:2].tolist()), percent(0)]
        right.set(xlabel=f"direction 1 ({shares[0]})", ylabel=f"direction 2 ({shares[1]})", title="Path of training")
        right.set_aspect("equal", adjustable="datalim")
        legend(right)
        return figure_of(left)


@full_precision
@torch.no_grad()
def trajectory_spectrum(checkpoints: Iterable[Checkpoint]) -> TrajectorySpectrum:
    r"""Computes the singular value decomposition of how the weights moved from the first checkpoint on.

    The rows of the matrix that is decomposed are :math:`\theta_t - \theta_0`, over all floating point parameters and
    buffers. It has far more columns than rows, so that its Gram matrix, one number for each pair of checkpoints, is
    formed parameter by parameter; squaring leaves singular values below 1e-8 of the largest without digits. Training
    that stays in few directions can be continued in them (Gur-Ari, Roberts and Dyer, "Gradient Descent Happens in a
    Tiny Subspace", 2018).

    Args:
        checkpoints: models or state dicts, at least two, in the order of training, or the
            :class:`CheckpointRecorder` that kept them. A state dict shares its memory with the model: keep
            ``copy.deepcopy(model.state_dict())``.

    Raises:
        LowRankError: for fewer than two checkpoints, names or shapes that differ, values that are not finite, or
            weights that never change.

    Examples:
        >>> start, step = torch.randn(8, 4), torch.randn(8, 4)
        >>> found = lr.trajectory_spectrum([{"w": start + t * step} for t in range(5)])
        >>> found.directions_for(0.99), found.projections.shape
        (1, torch.Size([4, 4]))
    """
    states = [_tensors(each) for each in checkpoints]
    if len(states) < 2:
        raise LowRankError(f"trajectory_spectrum: got {len(states)} checkpoints, expected at least 2.")
    for k, state in enumerate(states[1:], 1):
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in states[0].items()}:
            raise LowRankError(f"trajectory_spectrum: checkpoint {k} has other tensors or shapes than the first.")
    gram = torch.zeros(len(states) - 1, len(states) - 1, dtype=torch.float64)
    changes = {}
    columns = 0
    for name, start in states[0].items():
        differences = torch.stack([state[name].cpu().double() - start.cpu().double() for state in states[1:]])
        rows = check_tensor(differences.reshape(len(gram), -1), f"trajectory_spectrum, {name!r}")
        gram += rows @ rows.mT
        columns += rows.shape[1]
        if start.ndim > 1:
            changes[name] = MatrixSpectrum.of(differences[-1].flatten(1))
    if not bool(gram.any()):
        raise LowRankError(
            "trajectory_spectrum: the weights never change; a state dict shares its memory with the model, keep"
            " copy.deepcopy(model.state_dict())."
        )
    values, vectors = torch.linalg.eigh(gram)
    count = min(len(gram), columns)
    values, vectors = values.flip(0).clamp_min(0).sqrt()[:count], vectors.flip(1)[:, :count]
    return TrajectorySpectrum(MatrixSpectrum(values, (len(gram), columns)), vectors * values, changes)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state = checkpoint.state_dict() if isinstance(checkpoint, nn.Module) else checkpoint
    if not isinstance(state, Mapping):
        raise LowRankError(f"trajectory_spectrum: got {type(state).__name__}, expected a model or a state dict.")
    found = {name: t for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point() and t.numel()}
    if not found:
        raise LowRankError("trajectory_spectrum: a checkpoint has no floating point tensors.")
    return found
