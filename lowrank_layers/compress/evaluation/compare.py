"""Two models side by side: what compression cost, and what it saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ...errors import LowRankError
from ..recovery.objective import Metric
from ..recovery.scoring import Score
from .evaluate import Evaluation, evaluate_together, shown
from .latency import Latency

_HEAD = ("", "before", "after", "ratio")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; it prints as a table.

    Args:
        before: evaluation of the model before compression.
        after: evaluation of the compressed model.
        latency_ratio: latency after over before: median and spread over pairs of calls, or the ratio of the medians
            where the two were not timed together, with a spread of NaN.
    """

    before: Evaluation
    after: Evaluation
    latency_ratio: Latency

    def ratios(self) -> dict[str, float | None]:
        """Returns the numbers after over those before; ``None`` where there is none before, or it is 0."""
        before = self.before.numbers()
        found = {
            name: value / before[name] if before.get(name) else None for name, value in self.after.numbers().items()
        }
        return {**found, "latency, ms": self.latency_ratio.median, "its spread, ms": None}

    def to_json(self) -> str:
        """Returns both evaluations and their ratios as JSON."""
        spread = None if math.isnan(self.latency_ratio.spread) else self.latency_ratio.spread
        ratio = {**self.ratios(), "spread of the latency's": spread}
        body = {"before": asdict(self.before), "after": asdict(self.after), "ratio": ratio}
        return json.dumps(body, indent=1)

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = [_HEAD, ("---", "---:", "---:", "---:"), *self._rows()]
        return "\n".join(f"| {' | '.join(row)} |" for row in lines)

    def __str__(self) -> str:
        rows = [_HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        template = "  ".join(f"{{:{'>' if k else '<'}{width}}}" for k, width in enumerate(widths))
        return "\n".join(template.format(*row).rstrip() for row in rows)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        before, after = self.before.numbers(), self.after.numbers()
        rows = []
        for name, ratio in self.ratios().items():
            known = shown(before[name]) if name in before else ""
            rows.append((name, known, shown(after[name]), "" if ratio is None else f"{ratio:.3f}"))
        return rows


def compare(
    before: nn.Module | Evaluation,
    after: nn.Module | Evaluation,
    data: Iterable[Any] | None = None,
    *,
    metric: Metric | Mapping[str, Metric] | None = None,
    score: Score | Mapping[str, Score] | None = None,
    example: Any = None,
    repeats: int = 30,
) -> Comparison:
    r"""Sets a model beside the one that it was compressed from: cost, latency and metrics of both, and their ratios.

    Two models are timed by turns, so that both meet the same state of the machine, and the ratio of their latencies is
    the median over pairs of calls.

    Args:
        before: the dense model, or what :func:`evaluate` returned for it.
        after: the compressed model, or what :func:`evaluate` returned for it.
        data: batches, as in :func:`evaluate`; needed for models.
        metric: ``metric(output, target) -> number``, or several by name.
        score: ``score(model) -> number``, or several by name.
        example: the batch whose forward pass is counted and timed; ``None`` takes the first batch of the data.
        repeats: number of forward passes of each model that are timed.

    Raises:
        LowRankError: for a model beside an evaluation, models without data, and what :func:`evaluate` refuses.

    Examples:
        >>> import copy
        >>> dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, rank=8))
        >>> comparison = lr.compare(dense, small, [torch.randn(20, 64)])
        >>> print("\n".join(str(comparison).splitlines()[:4]))
                            before   after  ratio
        parameters           4,810   1,690  0.351
        bytes               19,240   6,760  0.351
        MACs per sample      4,736   1,616  0.341
    """
    if isinstance(before, Evaluation) and isinstance(after, Evaluation):
        if before.latency.median <= 0:
            raise LowRankError(f"compare: got a latency of {before.latency.median!r} s before, expected one above 0.")
        ratio = Latency(after.latency.median / before.latency.median, float("nan"))
        return Comparison(before, after, ratio)
    if not isinstance(before, nn.Module) or not isinstance(after, nn.Module):
        kinds = f"{type(before).__name__} and {type(after).__name__}"
        raise LowRankError(f"compare: got {kinds}, expected two models, or what evaluate returned for both.")
    if data is None:
        raise LowRankError("compare: got two models without data; give the batches that evaluate takes.")
    found, seconds = evaluate_together(
        [before, after], data, metric=metric, score=score, example=example, repeats=repeats
    )
    pairs = [last / first for first, last in zip(*seconds, strict=True)]
    return Comparison(found[0], found[1], Latency.of(pairs))
