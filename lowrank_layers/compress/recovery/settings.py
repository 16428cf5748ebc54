"""What a user chooses about a recovery, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...checks import check_integer, is_number
from ...errors import LowRankError

DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes that autocast takes."""


@dataclass(frozen=True)
class RecoverySettings:
    r"""Settings of :func:`recover_`, which takes them as one value or by name.

    The optimizer is AdamW. Its learning rate rises linearly during the warm-up and falls to zero by a half cosine. The
    objective is the loss, plus ``distillation_weight`` times the distance of the output from the teacher's, plus
    ``hidden_weight`` times the mean distance of the chosen hidden states.

    Args:
        steps: number of optimizer steps.
        lr: greatest learning rate. The default suits networks that lost much; a transformer that lost little wants
            about ``1e-4``. Held-out data for :func:`recover_` keep too large a rate from harming the model.
        warmup: fraction of the steps in which the learning rate rises, in [0, 1].
        weight_decay: decoupled weight decay.
        clip: greatest norm of the gradient; ``None`` does not clip.
        accumulate: number of batches per optimizer step; the objective is the mean of theirs.
        trainable: ``"all"`` trains every parameter that requires gradients, ``"factors"`` only those of the factored
            layers.
        freeze_batch_norm: batch norms normalize by the running statistics that they have, and keep them; their weights
            and biases are trained all the same. It suits small batches, and hidden states that are matched to a
            teacher's: there the statistics are to be the teacher's too.
        dtype: dtype of autocast, ``torch.bfloat16`` or ``torch.float16`` (whose loss is scaled); ``None`` computes in
            the model's own.
        distance: the distance of outputs: ``"kl"``, the Kullback-Leibler divergence from the teacher's prediction to
            the model's, or ``"mse"`` for outputs that are no logits.
        temperature: divides the logits of both models in the divergence, which is multiplied by its square.
        class_dim: the dimension of the classes in the output.
        distillation_weight: weight of the distance of the outputs.
        hidden: names of modules whose outputs are to be those of the teacher's modules of the same names. Their
            distance is the squared error over the teacher's square.
        hidden_weight: weight of the distance of the hidden states.
        validate_every: number of steps between two scores on held-out data; ``None`` takes a twentieth of the steps.
        patience: number of scores in a row without an improvement after which training stops; ``None`` never stops
            early.
        save_every: number of steps between two states on disk.
        seed: seed of everything random in the run: dropout, and the order of data that torch's generator decides.

    Raises:
        LowRankError: for a value that is out of range.

    Examples:
        >>> lr.RecoverySettings(steps=100, warmup=0.05).lr_factor(0)
        0.2
    """

    steps: int = 1000
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    trainable: Literal["all", "factors"] = "all"
    freeze_batch_norm: bool = False
    dtype: torch.dtype | None = None
    distance: Literal["kl", "mse"] = "kl"
    temperature: float = 1.0
    class_dim: int = -1
    distillation_weight: float = 1.0
    hidden: Sequence[str] = ()
    hidden_weight: float = 1.0
    validate_every: int | None = None
    patience: int | None = None
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None or name in ("steps", "accumulate", "save_every"):
                check_integer(value, "RecoverySettings", name, 1)
        check_integer(self.seed, "RecoverySettings", "seed", 0)
        self._check_number("lr", above=True)
        self._check_number("temperature", above=True)
        if self.clip is not None:
            self._check_number("clip", above=True)
        for name in ("warmup", "weight_decay", "distillation_weight", "hidden_weight"):
            self._check_number(name)
        if self.warmup > 1:
            raise LowRankError(f"RecoverySettings: got warmup={self.warmup!r}, expected a fraction of the steps.")
        for name, known in (("trainable", ("all", "factors")), ("distance", ("kl", "mse"))):
            if (value := getattr(self, name)) not in known:
                raise LowRankError(f"RecoverySettings: got {name}={value!r}, expected {known[0]!r} or {known[1]!r}.")
        if not isinstance(self.freeze_batch_norm, bool):
            raise LowRankError(
                f"RecoverySettings: got freeze_batch_norm={self.freeze_batch_norm!r}, expected True or False."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LowRankError(f"RecoverySettings: got dtype={self.dtype!r}, expected None or one of {list(DTYPES)}.")
        if not isinstance(self.class_dim, int):
            raise LowRankError(f"RecoverySettings: got class_dim={self.class_dim!r}, expected an integer.")
        if isinstance(self.hidden, str) or not all(isinstance(name, str) for name in self.hidden):
            raise LowRankError(f"RecoverySettings: got hidden={self.hidden!r}, expected a list of names of modules.")
        object.__setattr__(self, "hidden", tuple(self.hidden))

    def _check_number(self, name: str, above: bool = False) -> None:
        value = getattr(self, name)
        if not is_number(value) or not math.isfinite(value) or value < 0 or (above and value == 0):
            expected = "a number above 0" if above else "a number of at least 0"
            raise LowRankError(f"RecoverySettings: got {name}={value!r}, expected {expected}.")

    def lr_factor(self, step: int) -> float:
        """Returns the learning rate of a step over the greatest one.

        Args:
            step: number of steps before it.
        """
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (self.steps - rising)))

    def is_due(self, step: int) -> bool:
        """Returns whether the model is scored after so many steps.

        Args:
            step: number of steps done.
        """
        every = max(1, self.steps // 20) if self.validate_every is None else self.validate_every
        return step % every == 0 or step == self.steps
