"""The rank of least error on what was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integer, is_number
from ..errors import LowRankError
from ..factors import Factorization
from ..linalg import is_dense, scaled_to_unit, working_dtype
from .refit import Refit, check_ranks
from .rule import Spectrum, WithoutValues

TOLERANCE = 1e-3
"""Relative change of the imputed entries at which they have converged."""
EXACT = 1e-4
"""Squared relative error that counts as none: what the imputation may leave where the tensor has that rank."""
SWEEPS = 30


@dataclass(frozen=True)
class CrossValidation(WithoutValues):
    """The least rank that is as good as the best one on what was held out, by k-fold cross-validation.

    Without a ``score`` every entry of the tensor is held out once, in one of several random folds: the others are
    factorized by expectation maximization, in which the model's own values stand for the entries held out until they
    change no more, and the error is that of the model at these entries (Wold, "Cross-Validatory Estimation of the
    Number of Components in Factor and Principal Components Models", 1978; Bro, Kjeldahl, Smilde and Kiers, 2008).

    With a ``score`` the tensor is factorized once per rank, and each factorization is scored once per fold: by the
    accuracy of a model with the factorized layer on that fold of its data, for example.

    A rank is as good as the best if it is worse by at most one standard error of their difference over the folds
    (Breiman, Friedman, Olshen and Stone, 1984), or by nothing that counts: 1e-4 of the squared entries held out.

    Args:
        folds: number of folds, at least 2.
        ranks: the ranks to try. The largest rank of use is left out.
        score: gets a factorization and the number of a fold, and returns a number, larger ones being better.
        seed: seed of the folds of entries; the global generator is untouched.

    Examples:
        >>> matrix = torch.randn(40, 3) @ torch.randn(3, 30)
        >>> lr.svd(matrix + 0.2 * torch.randn(40, 30), lr.CrossValidation(ranks=range(1, 7))).rank
        3
        >>> weight, images = torch.randn(20, 4) @ torch.randn(4, 30), torch.randn(5, 30, 8)
        >>> def score(found, fold):
        ...     return -(found.to_dense() @ images[fold] - weight @ images[fold]).norm().item()
        >>> lr.svd(weight, lr.CrossValidation(score=score)).rank
        4
    """

    folds: int = 5
    ranks: Sequence[int] = range(1, 11)
    score: Callable[[Factorization, int], float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.folds, "CrossValidation", "folds", 2)
        check_ranks(self.ranks, "CrossValidation")
        if self.score is not None and not callable(self.score):
            raise LowRankError(
                f"CrossValidation: got score={self.score!r}, expected a function of a factorization and a fold."
            )

    def __call__(self, spectrum: Spectrum) -> int:
        """The rank to use."""
        refit = spectrum.require_refit(self)
        ranks = spectrum.ranks_below_full(self.ranks)
        if self.score is not None:
            losses, slack = self._scored(refit, ranks, spectrum.owner), 0.0
        else:
            losses, slack = self._held_out(refit, ranks, spectrum.owner), EXACT
        worse = losses - losses[:, losses.mean(0).argmin(), None]
        error = worse.std(0) / math.sqrt(self.folds)
        good = worse.mean(0) <= error.clamp_min(slack)
        return ranks[int(good.nonzero()[0])]

    def _scored(self, refit: Refit, ranks: Sequence[int], owner: str) -> Tensor:
        """The negative scores, ``[folds, ranks]``."""
        assert self.score is not None
        columns = []
        for rank in ranks:
            found = refit.fit(refit.tensor, rank, None)
            column = [self.score(found, fold) for fold in range(self.folds)]
            if not all(is_number(value) and math.isfinite(value) for value in column):
                raise LowRankError(f"{owner}: the score of CrossValidation returned {column}, expected finite numbers.")
            columns.append([-value for value in column])
        return torch.tensor(columns, dtype=torch.float64).mT

    def _held_out(self, refit: Refit, ranks: Sequence[int], owner: str) -> Tensor:
        """Squared errors of the entries held out, over the mean square of all entries, ``[folds, ranks]``."""
        tensor = refit.tensor
        if not is_dense(tensor):
            raise LowRankError(
                f"{owner}: got {self} and a sparse matrix; give CrossValidation a score, or a dense one."
            )
        if tensor.numel() < self.folds:
            raise LowRankError(f"{owner}: got {self} for {tensor.numel()} entries, expected at least one per fold.")
        tensor = scaled_to_unit(tensor.detach().to(working_dtype(tensor)))[0]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(tensor.numel(), generator=generator).reshape(tensor.shape).to(tensor.device)
        energy = max(float(tensor.double().square().mean()), 1e-300)
        rows = []
        for fold in range(self.folds):
            held_out = order % self.folds == fold
            imputed = torch.where(held_out, tensor[~held_out].mean(), tensor)
            row = []
            for rank in ranks:
                imputed = _impute(imputed, held_out, rank, refit)
                row.append(float((tensor - imputed)[held_out].double().square().mean()) / energy)
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float64)


def _impute(tensor: Tensor, held_out: Tensor, rank: int, refit: Refit) -> Tensor:
    """Replaces the entries held out by those of a factorization, until they stay as they are."""
    for _ in range(SWEEPS):
        model = refit.fit(tensor, rank, None).to_dense()
        change = torch.linalg.vector_norm((model - tensor)[held_out])
        tensor = torch.where(held_out, model, tensor)
        if change <= TOLERANCE * torch.linalg.vector_norm(tensor[held_out]):
            break
    return tensor
