"""The files that a calibration in stages writes: statistics of the layers of one stage each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from ..files import read_header
from ..layers import weight_of
from .example import map_tensors
from .layer_recorder import LayerRecorder, Pass
from .layer_stats import LayerStats
from .loss_scale import LossScale
from .padding import Padding
from .result_checks import check_finite, largest_gradient
from .shared_inputs import SharedInputs
from .statistics_file import FACTS, KEY, read_statistics, write_statistics


class StageFile:
    """The statistics of the layers of one stage, or of several that share layers: in memory, then in a file.

    Args:
        path: the file; if it is there, it is complete.
        stages: names of the stages.
        layers: names of the layers.
        padding: the masks of the passes.
        shared: which layers are given the same tensors.
        fingerprint: what the statistics are of, as :func:`fingerprint_of` says it.
        dtype: dtype of the moments in the file.
        widest: above how many outputs the moments of gradients are sketched.
        clip: as in :func:`calibrate`.

    Attributes:
        done: whether the file is written.
        largest: root of the largest entry of its moments of gradients.

    Raises:
        LowRankError: if the file has another fingerprint.
    """

    def __init__(
        self,
        path: Path,
        stages: Iterable[str],
        layers: Iterable[str],
        padding: Padding,
        shared: SharedInputs,
        fingerprint: str,
        dtype: torch.dtype,
        widest: int | None,
        clip: float | None,
    ) -> None:
        self.stages = frozenset(stages)
        self.done, self.largest = False, 0.0
        self._path, self._layers, self._fingerprint, self._dtype = path, tuple(layers), fingerprint, dtype
        self._current, self._shared = Pass(padding, dtype=dtype, widest=widest, clip=clip), shared
        self._recorders: dict[str, LayerRecorder] = {}
        if path.exists():
            body = read_header(path, KEY, "holds no statistics.")[0]
            if body.get("fingerprint") != fingerprint:
                raise LowRankError(
                    f"calibrate: {path} holds statistics of another model, other batches or another loss; give an"
                    " empty folder."
                )
            self.done, self.largest = True, float(body["largest"])

    @property
    def is_open(self) -> bool:
        """Whether there are statistics that are not in the file yet."""
        return bool(self._recorders)

    def record(
        self, samples: int, scale: LossScale, place: tuple[int, int], *, gradients: bool
    ) -> Mapping[str, LayerRecorder]:
        """Returns who takes the inputs and gradients of each layer in the next call; nobody if the file is written.

        Args:
            samples: number of samples of the batch.
            scale: the scale of its loss.
            place: index of the batch, and of the call in its pass.
            gradients: whether there is a loss.
        """
        if self.done:
            return {}
        if not self._recorders:
            leaders = self._shared.leaders(self._layers)
            own = {name: LayerRecorder(self._current) for name in self._layers if name not in leaders}
            self._recorders = own | {name: LayerRecorder(self._current, own[other]) for name, other in leaders.items()}
        self._current.samples, self._current.scale, self._current.place = samples, scale, place
        self._current.starts_gradients = gradients
        for recorder in self._recorders.values():
            recorder.start_pass()
        return self._recorders

    def write(self, samples: int) -> None:
        """Writes the file, and lets go of what was taken.

        Args:
            samples: number of samples of all batches.
        """
        taken = {}
        for name, recorder in self._recorders.items():
            recorder.finish(samples)
            if recorder.stats is not None:
                check_finite(name, recorder.stats)
                self.largest = max(self.largest, largest_gradient(recorder.stats))
                taken[name] = recorder.stats
        facts = dict.fromkeys(FACTS) | {"samples": samples, "watched": self._layers}
        facts |= {"fingerprint": self._fingerprint, "largest": self.largest}
        write_statistics(self._path, taken, facts, self._dtype)
        self.done, self._recorders = True, {}

    def read(self, device: str) -> dict[str, LayerStats]:
        """Returns the statistics by layer, whose moments are read each time they are asked for.

        Args:
            device: where tensors go.
        """
        return read_statistics(self._path, device)[0] if self.done else {}


def stage_files(
    folder: Path,
    places: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    padding: Padding,
    shared: SharedInputs,
    fingerprint: str,
    dtype: torch.dtype,
    widest: int | None,
    clip: float | None,
) -> dict[str, StageFile]:
    """Returns the file of each stage; stages that share a layer have one.

    Args:
        folder: where the files are.
        places: the stages by name, and all layers.
        layers: the layers whose moments are taken.
        padding: the masks of the passes.
        shared: which layers are given the same tensors.
        fingerprint: what the statistics are of.
        dtype: dtype of the moments in the files.
        widest: above how many outputs the moments of gradients are sketched.
        clip: as in :func:`calibrate`.
    """
    names = {module: name for name, module in layers.items()}
    groups: list[tuple[list[str], list[str]]] = []
    for place, module in places.items():
        own = dict.fromkeys(names[inner] for inner in module.modules() if inner in names)
        met = [group for group in groups if not own.keys().isdisjoint(group[1])]
        joined = (
            [name for group in met for name in group[0]] + [place],
            list(dict.fromkeys([*(name for group in met for name in group[1]), *own])),
        )
        groups = [group for group in groups if group not in met] + [joined]
    found: dict[str, StageFile] = {}
    for index, (stages, inside) in enumerate(groups):
        path = folder / f"{index:04d}-{(stages[0] or 'model').replace('/', '_')}.safetensors"
        file = StageFile(path, stages, inside, padding, shared, fingerprint, dtype, widest, clip)
        found |= dict.fromkeys(stages, file)
    return found


def fingerprint_of(batches: Sequence[Any], layers: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> str:
    """Returns text that differs for other batches, layers, weights or facts.

    Args:
        batches: the batches.
        layers: the layers; of their weights a few entries are looked at.
        facts: what JSON can hold, and objects that their fields tell apart.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())

    def add(tensor: Tensor) -> Tensor:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
        return tensor

    for batch in batches:
        map_tensors(add, batch)
    for name, layer in layers.items():
        weight = weight_of(layer).detach().flatten()
        digest.update(name.encode())
        add(weight[:: max(1, len(weight) // 16)])
    return digest.hexdigest()
