"""Losses that need no labels: their gradients' second moment is the Fisher matrix of the model's own prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LowRankError
from .batch_masks import IGNORED
from .masks import mask_of_rows

MANY_CLASSES = 1024
"""Up to so many classes labels are drawn by ``torch.multinomial``, which takes 2.7 ms per row for 49,152 of them."""


class SampledCrossEntropy:
    """Cross-entropy against labels that are drawn from the model's own softened prediction; needs no labels.

    The second moment of its gradients is the Fisher matrix of the prediction. At temperature 1 a network that fits its
    training data is so sure of itself that the sampled gradients vanish for almost every sample; a softened prediction
    keeps them alive. ResNet-20 at half the parameters, channel SVD: 85.38 % at temperature 1, 88.04 % at 4; at 30 %:
    73.48 and 76.34 % (``benchmarks/results``).

    Args:
        temperature: divides the logits.
        class_dim: the dimension of the classes.
        seed: seed of the drawn labels; the global generator is left alone.

    Shape:
        output ``[N, ..., classes]``; an object with ``.logits`` is taken too. Of the target only entries of -100 are
        looked at, where it has the shape ``[N, ...]``: such a position draws no label, nor does one that is false in
        ``mask``. :func:`calibrate` passes the mask of the batch.

    Examples:
        >>> loss = lr.SampledCrossEntropy()
        >>> loss(torch.randn(8, 10), None).shape
        torch.Size([])

    Martens, "New Insights and Perspectives on the Natural Gradient Method", 2020, section 5.
    """

    def __init__(self, temperature: float = 4.0, *, class_dim: int = -1, seed: int = 0) -> None:
        if not temperature > 0:
            raise LowRankError(f"SampledCrossEntropy: got temperature {temperature!r}, expected a number above 0.")
        self.temperature = temperature
        self.class_dim = class_dim
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, output: Any, target: Any = None, mask: Tensor | None = None) -> Tensor:
        """Returns the scalar loss, averaged over the batch and all positions that are data."""
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim < 2:
            remedy = (
                "give a loss of your own."
                if isinstance(output, Tensor)
                else "if a part of it is logits, choose it: sampled = SampledCrossEntropy();"
                f" loss = lambda output, target, mask=None: sampled(output{main_part(output)}, target, mask)."
            )
            raise LowRankError(
                f"SampledCrossEntropy: the model returned {describe_output(output)}, expected logits of at least"
                f" 2 dimensions, [N, ..., classes], or an object with .logits; {remedy}"
            )
        logits = logits.movedim(self.class_dim, -1)
        chosen = counted_positions(tuple(logits.shape[:-1]), target, mask)
        logits = (logits.flatten(0, -2) if chosen is None else logits[chosen.to(logits.device)]).float()
        if not len(logits):
            raise LowRankError("SampledCrossEntropy: every position of a batch is padding; leave such batches out.")
        logits = logits / self.temperature
        return F.cross_entropy(logits, self._sampled(logits.detach().softmax(-1)))

    def _sampled(self, chances: Tensor) -> Tensor:
        """A class of every row, ``[rows, classes]`` to ``[rows]``, the same on every device."""
        if chances.shape[1] <= MANY_CLASSES:
            labels = torch.multinomial(chances.cpu(), 1, generator=self._generator).squeeze(1)
            return labels.to(chances.device)
        # multinomial draws a number per class; the inverse of the distribution function needs one per row
        drawn = torch.rand(len(chances), 1, generator=self._generator).to(chances.device)
        sums = chances.cumsum(-1)
        found = torch.searchsorted(sums, drawn * sums[:, -1:], right=True)
        return found.squeeze(1).clamp_max_(chances.shape[1] - 1)


def counted_positions(lead: tuple[int, ...], target: object, mask: Tensor | None) -> Tensor | None:
    """Returns the positions of an output that are data and have no label of -100; ``None`` if all count.

    Args:
        lead: the output's shape without the classes.
        target: the target, whose labels are looked at where it has this shape.
        mask: the mask of the output, nonzero at data.
    """
    chosen = None
    if isinstance(target, Tensor) and tuple(target.shape) == lead and not target.is_floating_point():
        chosen = target != IGNORED
    found = None if mask is None else mask_of_rows(mask != 0, lead)
    if found is not None:
        chosen = found[0] if chosen is None else chosen.to(found[0].device) & found[0]
    return chosen


def main_output(output: Any) -> Tensor | None:
    """Returns the tensor that a loss most likely looks at: the logits, or the first one of two dimensions or more."""
    logits = getattr(output, "logits", output)
    if isinstance(logits, Tensor):
        return logits
    return next((value for _, value in _parts(output) if isinstance(value, Tensor) and value.ndim > 1), None)


def describe_output(output: object) -> str:
    """Describes what a model returned, in words.

    Examples:
        >>> describe_output((torch.zeros(2, 3), torch.tensor(0.0)))
        'a tuple of (tensor [2, 3], tensor [])'
    """
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    kind, parts = type(output).__name__, _parts(output)
    if isinstance(output, (tuple, list)):
        return f"a {kind} of ({', '.join(_brief(value) for _, value in parts)})"
    named = ", ".join(f"{how.strip('.[]')}: {_brief(value)}" for how, value in parts if value is not None)
    return f"a {kind} with {named}" if named else f"a {kind}"


def main_part(output: object) -> str:
    """Returns how to write the part of an output that a loss may look at: ``[0]``, ``.last_hidden_state``."""
    main = main_output(output)
    return next((how for how, value in _parts(output) if value is main and main is not None), ".your_part")


def _parts(output: object) -> list[tuple[str, object]]:
    """The parts of an output, each after how it is written."""
    if is_dataclass(output) and not isinstance(output, type):
        return [(f".{each.name}", getattr(output, each.name)) for each in fields(output)]
    if isinstance(output, Mapping):
        return [(f"[{name!r}]".replace("'", '"'), value) for name, value in output.items()]
    if isinstance(output, (tuple, list)):
        return [(f"[{place}]", value) for place, value in enumerate(output)]
    return []


def _brief(value: object) -> str:
    return f"tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
