"""How far the model's output moves when one layer alone is replaced, over what its error predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import describe_output, main_output, quiet_eval
from ..calibrate.example import map_tensors
from ..calibrate.fisher import counted_positions
from ..calibrate.overridden import overridden
from ..calibrate.prefix_memo import KnownPass, PrefixMemo
from ..calibrate.staged_calibration import without_cache
from ..calibrate.statistics import Statistics
from ..errors import LowRankError
from ..memory import release_mapped
from .allocation import Offer
from .candidates import Candidate
from .recovery.distillation import divergence, single

ROWS = 1024
"""Positions of the output, at least, that are looked at where the batches have so many."""
SHARE = 0.5
"""Part of its parameters that a layer keeps while it is measured: pairs at about a third of the full rank."""
VISIBLE = 1e-4
"""Part of its energy that a layer has to lose for a measurement."""
LEAST = 1e-10
"""Where a layer changes nothing, its curve is not scaled to nothing."""
SURE = 1.0
"""Mean entropy, in nats, below which predictions are softened: their divergence saturates where a layer alone breaks
the model, as an image classifier's. Those of the next word are soft by themselves."""
TEMPERATURE = 4.0
"""By which they are softened, as by :class:`SampledCrossEntropy`."""
ENTRIES = 1 << 22
"""Entries of the output that are compared at once."""
CLASSIFIERS = ("SampledCrossEntropy", "CrossEntropyLoss", "cross_entropy")
"""Losses whose outputs are logits over their last dimension."""


class MeasuredEffects:
    """Measures what layers do to the output of a model, one at a time; a context manager.

    A layer is replaced at one cheap rank, and what comes after it is run again on a few batches. Distance is the mean
    divergence KL(dense, compressed) of the predictions where the output is logits, softened where the dense ones are
    nearly certain, and the squared error over the output's variance elsewhere. A layer's whole curve is scaled by
    measured over predicted.

    Args:
        model: the dense model, its attentions opened.
        batches: batches in the form that :func:`calibrate` takes.
        stats: the statistics of the model, if there are any.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], stats: Statistics | None) -> None:
        self._model = model
        self._is_classifier = stats is not None and stats.loss in CLASSIFIERS
        with_target, mask = (False, None) if stats is None else (stats.with_target, stats.mask)
        self._memo = PrefixMemo(model, with_target=with_target, mask=mask)
        self._batches, self._known = batches, list[KnownPass]()
        self._temperature = 1.0
        self._undo = ExitStack()

    def __enter__(self) -> MeasuredEffects:
        with ExitStack() as undo:
            undo.enter_context(quiet_eval(self._model))
            undo.enter_context(without_cache(self._model))
            undo.enter_context(self._memo)
            first = self._memo.add(self._batches[0])
            rows = max(1, len(_rows(first, first.output)))
            shorter = _cut(first, rows)
            self._known = [first if shorter is None else self._memo.add(shorter)]
            count = -(-ROWS // rows)
            step = max(1, len(self._batches) // count)
            self._known += map(self._memo.add, self._batches[step::step][: count - 1])
            if all(map(self._is_logits, self._known)):
                entropies = [_entropy(_rows(known, known.output)) for known in self._known]
                self._temperature = TEMPERATURE if sum(entropies) < SURE * len(entropies) else 1.0
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def effect(self, name: str, layer: Candidate, offers: Sequence[Offer]) -> float:
        """Returns measured over predicted loss of a layer.

        Args:
            name: the layer.
            layer: what planning knows of it.
            offers: its options, dense first.
        """
        chosen = tried(layer, offers)
        if chosen is None or layer.idle:
            return 1.0
        assert chosen.method is not None
        with self._memo.own_forward(name):
            built = chosen.method.build(layer, chosen.option.rank).eval()
        return self._moved_by(name, built) / chosen.option.loss_increase

    def group_effect(self, key: str, leader: str, make: Callable[[], nn.Module], loss: float) -> float:
        """Returns measured over predicted loss of layers that change together.

        Args:
            key: the name under which a plan keeps it.
            leader: the layer whose error is that of the group.
            make: builds the layer that takes its place, with which the model is what it is without some units.
            loss: what is predicted of that.
        """
        with self._memo.own_forward(leader):
            built = make().eval()
        return self._moved_by(leader, built) / loss

    def _moved_by(self, name: str, built: nn.Module) -> float:
        """How far the output moves where another layer computes in the place of one."""
        with overridden(self._model.get_submodule(name), built.forward):
            distances = [self._distance(known, self._memo.rerun(known, name)) for known in self._known]
        release_mapped(self._model.parameters())
        return max(sum(distances) / len(distances), LEAST)

    def _distance(self, known: KnownPass, output: Any) -> float:
        ours, dense = _rows(known, output), _rows(known, known.output)
        if self._is_logits(known):
            step = max(1, ENTRIES // dense.shape[-1])
            parts = zip(ours.split(step), dense.split(step), strict=True)
            found = (len(a) * divergence(_exact(a), _exact(b), self._temperature) for a, b in parts)
            return float(sum(found)) / len(dense)
        spread = (dense - dense.mean(0)).square().sum()
        return float((ours - dense).square().sum() / spread.clamp_min(1e-30))

    def _is_logits(self, known: KnownPass) -> bool:
        """Whether an output is logits over its last dimension; those of pixels, [N, C, H, W], are over another one."""
        main = main_output(known.output)
        has_classes = main is not None and main.ndim in (2, 3) and main.shape[-1] > 1
        return has_classes and (self._is_classifier or hasattr(known.output, "logits"))


def _entropy(logits: Tensor) -> float:
    """The mean entropy of predictions ``[count, classes]``, in nats."""
    parts = logits.split(max(1, ENTRIES // logits.shape[-1]))
    return sum(float(torch.special.entr(part.softmax(-1)).sum()) for part in parts) / len(logits)


def _exact(rows: Tensor) -> Tensor:
    """In double precision, where there is any: divergences of one layer alone may be of the size of roundings."""
    return rows if rows.device.type == "mps" else rows.double()


def _rows(known: KnownPass, output: Any) -> Tensor:
    """The rows of an output that are data, ``[count, features]``."""
    main = main_output(output)
    if main is None or main.ndim == 0:
        raise LowRankError(
            f"make_plan: the model returned {describe_output(output)}, expected a tensor of 2 dimensions or more among"
            " it to measure; leave batches= out."
        )
    main = main[:, None] if main.ndim == 1 else main
    chosen = counted_positions(tuple(main.shape[:-1]), known.target, known.mask)
    rows = main.flatten(0, -2) if chosen is None else main[chosen.to(main.device)]
    return single(rows)


def _cut(known: KnownPass, rows: int) -> Any:
    """The first samples of a batch that has far more than it takes; ``None`` for the whole of it."""
    main = main_output(known.output)
    assert main is not None
    wanted = -(-ROWS * len(main) // rows)
    lengths: list[int] = []

    def look(tensor: Tensor) -> Tensor:
        lengths.append(len(tensor) if tensor.ndim else 0)
        return tensor

    map_tensors(look, known.batch)
    if 2 * wanted > len(main) or any(length != len(main) for length in lengths):
        return None
    return map_tensors(lambda tensor: tensor[:wanted], known.batch)


def tried(layer: Candidate, offers: Sequence[Offer]) -> Offer | None:
    """Returns the option that a layer is measured at: the best that keeps at most half of its parameters.

    Those in int8 are passed over: rounding alone is too little to be measured, and has the units of all losses.

    Args:
        layer: what planning knows of it.
        offers: its options, dense first.
    """
    floating = [offer for offer in offers[1:] if offer.option.bits is None]
    seen = [offer for offer in floating if offer.option.loss_increase > VISIBLE * layer.energy]
    if not seen:
        return None
    small = [offer for offer in seen if offer.option.cost.params <= SHARE * layer.before.params]
    if small:
        return min(small, key=lambda offer: offer.option.loss_increase)
    return min(seen, key=lambda offer: offer.option.cost.params)


def scaled(offers: Sequence[Offer], effect: float) -> list[Offer]:
    """Returns the options with their losses scaled.

    Args:
        offers: the options of a layer.
        effect: measured over predicted loss.
    """
    return [
        replace(offer, option=replace(offer.option, loss_increase=effect * offer.option.loss_increase))
        for offer in offers
    ]
