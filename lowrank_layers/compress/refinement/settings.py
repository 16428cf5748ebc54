"""What a user chooses about a refinement, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...checks import check_integer, is_number
from ...errors import LowRankError
from ..recovery.settings import RecoverySettings


@dataclass(frozen=True)
class RefinementSettings:
    """Settings of :func:`refine_`, which takes them as one value or by name.

    Args:
        epochs: number of passes over the batches, in each stage. The learning rate of AdamW rises linearly during the
            warm-up and falls to zero by a half cosine.
        lr: greatest learning rate.
        warmup: fraction of the steps in which the learning rate rises, in [0, 1].
        weight_decay: decoupled weight decay.
        clip: greatest norm of the gradient; ``None`` does not clip.
        mixing: how much of the way from the parameters before the training to those behind it is gone in the end, in
            (0, 1]: the mixing coefficient of Wortsman et al., "Robust fine-tuning of zero-shot models" (2022). ``None``
            is 0.5 for models that read tokens, whose texts are seldom like those that they are refined on, and 1
            otherwise.
        trainable: ``"all"`` trains every parameter of a stage that requires gradients, ``"factors"`` only those of its
            factored layers.
        held_out: one batch out of so many is not trained on; by these it is decided which state of a stage is kept,
            and whether the whole is.
        distance: the distance of the model's outputs from those of the dense one: ``"kl"``, the Kullback-Leibler
            divergence of predictions, or ``"mse"`` for outputs that are no logits.
        class_dim: the dimension of the classes in the output.

    Raises:
        LowRankError: for a value that is out of range.

    Examples:
        >>> lr.RefinementSettings(epochs=4, lr=1e-4).epochs
        4
    """

    epochs: int = 2
    lr: float = 2e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = 1.0
    mixing: float | None = None
    trainable: Literal["all", "factors"] = "all"
    held_out: int = 8
    distance: Literal["kl", "mse"] = "kl"
    class_dim: int = -1

    def __post_init__(self) -> None:
        check_integer(self.epochs, "RefinementSettings", "epochs", 1)
        check_integer(self.held_out, "RefinementSettings", "held_out", 2)
        if self.mixing is not None and not (is_number(self.mixing) and 0 < self.mixing <= 1):
            raise LowRankError(f"RefinementSettings: got mixing={self.mixing!r}, expected a number in (0, 1] or None.")
        self.as_recovery(1)

    def mixing_for(self, *, reads_tokens: bool) -> float:
        """Returns the mixing coefficient of a model.

        Args:
            reads_tokens: whether it reads tokens.
        """
        return self.mixing or (0.5 if reads_tokens else 1.0)

    def as_recovery(self, steps: int) -> RecoverySettings:
        """Returns the settings of so many steps of training, which check what both have in common.

        Args:
            steps: number of optimizer steps.
        """
        names = ("lr", "warmup", "weight_decay", "clip", "trainable", "distance", "class_dim")
        return RecoverySettings(steps=steps, **{name: getattr(self, name) for name in names})
