"""The statistics of every layer that calibration has taken."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LowRankError
from .all_reduce import outline, reduced_sum
from .batch_masks import MaskOf
from .example import has_tokens, map_tensors
from .isotropic import isotropic_layers
from .layer_stats import LayerStats as LayerStats
from .merge import Add, merge_layers, weighted_sum
from .processes import Processes
from .statistics_file import FACTS, read_statistics, write_statistics


@dataclass
class Statistics(Mapping[str, LayerStats]):
    """The :class:`LayerStats` of every layer by name, and how they were taken.

    Args:
        layers: the statistics of every calibrated layer that was called.
        samples: how many samples were seen.
        with_target: whether the last item of a tuple batch is the target.
        other_macs: MACs per sample of layers that are counted but not calibrated (those with a computed weight).
        mask: how the padding of a batch is found, as given to :func:`calibrate`.
        example: the first sample of the first batch, as a batch of one; ``None`` where someone else ran the model.
        watched: names of all layers whose moments were to be taken, whether called or not.
        loss: name of the loss that was given to :func:`calibrate`.
        clip: how long rows of inputs may be, as given to :func:`calibrate`.
    """

    layers: dict[str, LayerStats] = field(default_factory=dict)
    samples: int = 0
    with_target: bool = False
    other_macs: int = 0
    mask: MaskOf | None = field(default=None, repr=False, compare=False)
    example: Any = field(default=None, repr=False, compare=False)
    watched: tuple[str, ...] = field(default=(), repr=False)
    loss: str | None = None
    clip: float | None = None

    def __getitem__(self, name: str) -> LayerStats:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def reads_tokens(self) -> bool:
        """Whether the inputs of the model are indices, such as those of words."""
        return has_tokens(self.example, with_target=self.with_target)

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> None:
        """Writes a safetensors file, which replaces ``path`` when it is complete.

        Moments that layers share are written once. An ``example`` that has anything but tensors, numbers and text, in
        tuples, lists and dicts, is left out: a budget of latency then asks for ``example=``.

        Args:
            path: the file.
            dtype: float64, or float32 for half the bytes. A small Llama, a convolutional network and an MLP at 60 % of
                their parameters got the same plans from float32, weights that differ by at most 1e-6, and outputs that
                differ by 4e-7.

        Raises:
            CheckpointError: for a folder, and a file in a folder that does not exist.
            LowRankError: for a function as ``mask``, and for moments that float32 cannot hold.

        Examples:
            >>> import os, tempfile
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> path = os.path.join(tempfile.mkdtemp(), "stats.safetensors")
            >>> lr.calibrate(model, [torch.randn(32, 8)]).save(path)
            >>> stats = lr.Statistics.load(path)
            >>> stats.samples, stats["2"].inputs.second.shape
            (32, torch.Size([16, 16]))
        """
        if callable(self.mask):
            raise LowRankError(
                "Statistics.save: mask is a function, which no file holds; set stats.mask = None, and the function"
                " again after Statistics.load."
            )
        if dtype not in (torch.float64, torch.float32):
            raise LowRankError(f"Statistics.save: got dtype={dtype}, expected torch.float64 or torch.float32.")
        facts = {name: getattr(self, name) for name in FACTS}
        write_statistics(Path(path), self.layers, facts, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Statistics:
        """Opens what :meth:`save` wrote.

        Moments are read from the file each time a layer's are asked for, and not kept, so that :func:`make_plan` and
        :func:`factorize_` hold those of one layer. The file has to stay as it is meanwhile.

        Args:
            path: the file.
            device: the device on which the tensors are put.

        Raises:
            CheckpointError: for a file that is missing, torn or foreign.
        """
        layers, facts = read_statistics(Path(path), str(device))
        return cls(layers, **facts)

    def merge(self, *others: Statistics) -> Statistics:
        """Returns the statistics of all the data, of which this one and each of the others has seen a part.

        They are those of one calibration over all batches, to rounding. Of statistics that were loaded, moments are
        added up each time they are asked for, so that :meth:`save` holds one tensor at a time.

        Args:
            *others: statistics of the same model under the same loss, on other samples. Under
                :class:`SampledCrossEntropy` give each part its own ``seed``.

        Raises:
            LowRankError: for other layers, shapes or losses.

        Examples:
            >>> model, x = nn.Linear(8, 4), torch.randn(32, 8)
            >>> whole = lr.calibrate(model, [x])
            >>> merged = lr.calibrate(model, [x[:24]]).merge(lr.calibrate(model, [x[24:]]))
            >>> torch.allclose(merged[""].inputs.second, whole[""].inputs.second)
            True
        """
        return _merged([self, *others], weighted_sum)

    def isotropic(self, names: Iterable[str]) -> Statistics:
        """Returns statistics in which all outputs of the chosen layers count the same.

        Their ``G`` becomes the identity times the mean of its diagonal, so that losses stay comparable between layers.
        Of queries and keys ``G`` knows what a small change of one of them does under the other's present values, while
        both change, and pass a softmax. All the same, three transformers of three kinds did worse with it
        (``benchmarks/robust_statistics.py``).

        Args:
            names: names of layers, ends of them, or names of modules around them.

        Raises:
            LowRankError: for a name that matches no layer, and layers without gradients.

        Examples:
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            >>> stats = lr.calibrate(model, [torch.randn(32, 8)], loss=lr.SampledCrossEntropy())
            >>> g = stats.isotropic(["2"])["2"].gradients
            >>> torch.allclose(g, torch.eye(4).double() * stats["2"].gradients.diagonal().mean())
            True
        """
        return replace(self, layers=isotropic_layers(self.layers, names))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Statistics:
        """Returns, in every process, the statistics of all the data, of which each process has seen a part.

        Every process of the group has to call it; one that had no data calls it on an empty ``Statistics()``.

        Args:
            group: the processes; ``None`` is all.

        Raises:
            LowRankError: without a process group, and as :meth:`merge`.
        """
        on_cpu = map_tensors(Tensor.cpu, self.example)
        shown = replace(self, layers=outline(self.layers), mask=None, example=on_cpu)
        processes = Processes.within(group)
        parts = processes.gather(shown)
        parts[processes.rank] = replace(self, example=on_cpu)
        device = next((layer.inputs.mean.device for layer in self.values()), torch.device("cpu"))
        found = _merged(parts, partial(reduced_sum, processes=processes, device=device))
        return replace(found, mask=self.mask, example=map_tensors(lambda tensor: tensor.to(device), found.example))


def check_statistics(stats: object, function: str) -> None:
    """Raises for what are no statistics.

    Args:
        stats: what was given.
        function: the function that was called, for the message.
    """
    if not isinstance(stats, Statistics):
        raise LowRankError(f"{function}: got stats of type {type(stats).__name__}, expected what calibrate returned.")


def _merged(parts: Sequence[Statistics], add: Add) -> Statistics:
    """The statistics of all parts; those without data and layers change nothing."""
    for part in parts:
        check_statistics(part, "merge")
        if part.layers and not part.samples:
            raise LowRankError("merge: got statistics of 0 samples, expected those of a finished calibration.")
    parts = [part for part in parts if part.samples] or parts[:1]
    for part in parts[1:]:
        _check_same(parts[0], part)
    samples = [part.samples for part in parts]
    macs = sum(part.other_macs * part.samples for part in parts) / max(1, sum(samples))
    return replace(
        parts[0],
        layers=merge_layers([part.layers for part in parts], samples, add),
        samples=sum(samples),
        other_macs=round(macs),
        example=next((part.example for part in parts if part.example is not None), None),
    )


def _check_same(one: Statistics, other: Statistics) -> None:
    """Raises for statistics of other layers, or under another loss."""
    different = sorted({*one.watched} ^ {*other.watched})
    if different:
        raise LowRankError(
            f"merge: got statistics of different layers, of which {different[0]!r} is in one part only; calibrate the"
            " same model with the same target= for each."
        )
    if one.clip != other.clip:
        raise LowRankError(f"merge: got statistics with clip={one.clip} and {other.clip}, expected one for all parts.")
    if one.loss != other.loss or _has_gradients(one) != _has_gradients(other):
        losses = [
            (each.loss or "no loss") + (" with gradients" if _has_gradients(each) else "") for each in (one, other)
        ]
        raise LowRankError(
            f"merge: got statistics under {losses[0]} and under {losses[1]}, expected the same loss= in each part."
        )


def _has_gradients(stats: Statistics) -> bool:
    return any(vars(layer)["gradients"] is not None for layer in stats.values())
