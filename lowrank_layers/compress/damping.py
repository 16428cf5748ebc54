"""How far second moments are pulled towards multiples of the identity, and towards their diagonals."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from ..calibrate.statistics import Statistics, check_statistics
from ..checks import is_number
from ..errors import LowRankError

TOKENS = 0.25
"""How far the moments of models that read tokens are shrunk towards their diagonals.

SmolLM2, calibrated on 8,192 tokens of WikiText-2, in one shot by absolute units, layers alone, without shrinkage:
perplexity 42.4 on WikiText-2 and 33 on code at 80 % of its blocks, 74.9 and 381 at 60 %; with this for both moments:
41.6 and 21.5, 76.0 and 137. A ridge of 0.3 on the inputs in its place: 41.4 and 23.2, 82.7 and 204.
"""
UNITS = 0.03
"""The ridge for hidden units of models that read tokens.

Units that one kind of text hardly turns on matter for others. SmolLM2, as above, with hidden units too, at 80 % of its
blocks: 40.9 on WikiText-2 and 24.5 on code with a ridge of 0.001, 40.7 and 19.5 with this one, 41.6 and 19.2 with 0.1.
With the last one 59.8 and 52.2 at 60 %, and 54.2 and 46.9 with 0.001.
"""
ROUNDINGS = 64
"""Rounding errors of a second moment, in units of the last place of its mean."""


@dataclass(frozen=True)
class Damping:
    """Ridges on the two second moments that weight the approximation of a layer, and shrinkage of both.

    Moments are measured on few samples. A ridge keeps the directions that these samples never showed from counting
    for nothing. Shrinkage keeps what they say of each input and output by itself, and takes back a part of the
    correlations between them, which need more samples. :func:`make_plan` takes it; the plan keeps it, so that
    :func:`factorize_` weights layers likewise.

    A ridge ``a`` is itself a shrinkage, towards the scaled identity (Ledoit and Wolf, 2004): with ``s = a / (1 + a)``
    and ``m`` the mean of the diagonal of ``A``, ``A + a m I = (1 + a) ((1 - s) A + s m I)``, and a factor that all
    layers have changes nothing. So a shrinkage of 0.3 is a ridge of 0.3 / 0.7.

    Args:
        inputs: ridge on the second moment of the inputs, relative to their mean variance; it pulls the approximation
            towards that of the plain weight.
        outputs: ridge on the second moment of the loss's gradients at the outputs, relative to their mean; outputs that
            the calibration samples found unimportant keep some weight.
        input_shrinkage: the part of the correlations between inputs that is taken back: ``s`` in
            ``(1 - s) A + s diag(A)``, at least 0 and below 1.
        output_shrinkage: likewise of the gradients at the outputs.
        units: in the place of ``inputs`` where hidden units are removed: units that the calibration samples hardly turn
            on keep some weight. ``None`` takes ``inputs``.

    Raises:
        LowRankError: if a ridge is negative or no finite number, or a shrinkage is not at least 0 and below 1.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> stats = lr.calibrate(model, [torch.randn(100, 64)])
        >>> plan = lr.make_plan(model, lr.Budget(params=0.5), stats=stats, damping=lr.Damping(inputs=1e-2))
        >>> plan.damping
        Damping(inputs=0.01, outputs=0.1, input_shrinkage=0.0, output_shrinkage=0.0, units=None)
        >>> model = lr.factorize_(model, plan, stats=stats)
    """

    inputs: float = 1e-3
    outputs: float = 0.1
    input_shrinkage: float = 0.0
    output_shrinkage: float = 0.0
    units: float | None = None

    @property
    def of_units(self) -> Damping:
        """That of layers from which hidden units are removed."""
        return self if self.units is None else replace(self, inputs=self.units, units=None)

    @classmethod
    def default(cls, stats: Statistics | None) -> Damping:
        """Returns the damping that :func:`make_plan` uses where it is given none.

        It is ``Damping()``, and for a model that reads tokens both moments are shrunk by 0.25: a calibration shows few
        of its words, so that most correlations are those of one kind of text. ``units`` is 0.03 then.

        Args:
            stats: the statistics of the model, if there are any.

        Raises:
            LowRankError: if they are something else.

        Examples:
            >>> model = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 32))
            >>> lr.Damping.default(lr.calibrate(model, [torch.randint(1000, (4, 50))]))
            Damping(inputs=0.001, outputs=0.1, input_shrinkage=0.25, output_shrinkage=0.25, units=0.03)
        """
        if stats is not None:
            check_statistics(stats, "Damping.default")
        reads_tokens = stats is not None and stats.reads_tokens
        return cls(input_shrinkage=TOKENS, output_shrinkage=TOKENS, units=UNITS) if reads_tokens else cls()

    def __post_init__(self) -> None:
        for field in fields(self):
            value, is_share = getattr(self, field.name), field.name.endswith("_shrinkage")
            if field.name == "units" and value is None:
                continue
            if not is_number(value) or not (0 <= value < (1 if is_share else math.inf)):
                what = "a number of at least 0 and below 1" if is_share else "a finite number that is not negative"
                usual = self.inputs if field.name == "units" else field.default
                raise LowRankError(f"Damping: got {field.name}={value!r}, expected {what}, such as {usual}.")


def rounding_of(dtype: torch.dtype) -> float:
    """Returns how much of a second moment's mean is the rounding of its products, from which nothing is predicted.

    Args:
        dtype: the dtype of the weights; products are taken in fp32 at least.
    """
    return ROUNDINGS * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
