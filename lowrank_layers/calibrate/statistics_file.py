"""The file of statistics: safetensors, whose moments are read when they are asked for and not kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LowRankError
from ..files import DTYPES, TensorInfo, check_writable, read_header, read_tensor, write_streamed
from .example import pack, unpack
from .layer_stats import LayerStats
from .leave_out import LeaveOut
from .moments import Moments
from .readable import Unread, Value, read

KEY = "lowrank_layers.statistics"
VERSION = 1
FACTS = ("samples", "with_target", "other_macs", "mask", "clip", "watched", "loss", "example")
"""What statistics have besides layers."""
LAYER_FACTS = ("input_shape", "positions", "repeats", "traced", "free_bias", "rows_per_input", "gradient_rows")
"""What those of a layer have besides tensors."""
TENSORS = ("gradients", "cross", "target_mean")
SMALLEST, LARGEST = 1e-30, 3e38
"""What the largest entry of a moment is between where float32 holds it to 1e-7 of that entry."""


def write_statistics(
    path: Path, layers: Mapping[str, LayerStats], facts: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Writes statistics; of those that are in a file themselves, one tensor at a time is in memory.

    Args:
        path: the file.
        layers: the statistics by layer; moments that layers share are written once.
        facts: the fields ``FACTS`` of the whole; an example is left out if it has anything but tensors, numbers and
            text, in tuples, lists and dicts.
        dtype: dtype of the moments.

    Raises:
        CheckpointError: for a folder, and a file in a folder that does not exist.
        LowRankError: for moments that float32 cannot hold.
    """
    check_writable(path)
    packed, examples = _packed(facts["example"])
    rounded = dtype != torch.float64  # of a second moment far from zero little would be left but the mean
    body: dict[str, Any] = {"version": VERSION, **facts, "example": packed, "centred": rounded, "layers": {}}
    if isinstance(facts["mask"], LeaveOut):
        body["mask"] = asdict(facts["mask"])
    moments: dict[str, Value] = {}
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        owner = owners.setdefault(id(layer.inputs), name)
        if owner == name:
            mean, second = vars(layer.inputs)["mean"], vars(layer.inputs)["second"]
            centred = Unread(tuple(second.shape), layer.inputs.covariance)
            moments |= {f"{name}.mean": mean, f"{name}.second": centred if rounded else second}
        moments |= {f"{name}.{key}": vars(layer)[key] for key in TENSORS if vars(layer)[key] is not None}
        own = {fact: getattr(layer, fact) for fact in LAYER_FACTS}
        body["layers"][name] = {"inputs": owner, "rows": layer.inputs.rows, **own}
    infos = {name: TensorInfo(tuple(value.shape), dtype) for name, value in moments.items()}
    infos |= {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in examples.items()}

    def tensor_of(name: str) -> Tensor:
        return examples[name] if name in examples else _rounded(name, moments[name], dtype)

    write_streamed(path, infos, tensor_of, {KEY: json.dumps(body)})


def read_statistics(path: Path, device: str) -> tuple[dict[str, LayerStats], dict[str, Any]]:
    """Returns the statistics by layer, whose moments are not read yet, and the fields ``FACTS`` of the whole.

    Args:
        path: the file.
        device: where tensors go.

    Raises:
        CheckpointError: for a file that is missing, torn or foreign.
    """
    body, infos = read_header(path, KEY, f"was not written by Statistics.save (no {KEY!r} in its metadata).")
    file = _File(path.absolute(), _stamp(path), device)
    try:
        if body.pop("version") != VERSION:
            raise CheckpointError(f"another format version than {VERSION}; update the package")
        examples = {name for name in infos if name.startswith("example.") and name[8:].isdecimal()}
        unread = {name: file.unread(name, info.shape) for name, info in infos.items() if name not in examples}
        known: dict[str, Moments] = {}
        layers = {}
        for name, own in body.pop("layers").items():
            owner = own["inputs"]
            if owner == name:
                mean, second = unread.pop(f"{name}.mean"), unread.pop(f"{name}.second")
                if body["centred"]:
                    second = Unread(second.shape, partial(_around_zero, mean, second))
                known[name] = Moments(mean, second, own["rows"])
            tensors = {key: unread.pop(f"{name}.{key}", None) for key in TENSORS}
            _check_shapes(name, known[owner], tensors)
            facts: dict[str, Any] = {fact: own[fact] for fact in LAYER_FACTS}
            facts["input_shape"] = None if facts["input_shape"] is None else tuple(facts["input_shape"])
            layers[name] = LayerStats(known[owner], **facts | tensors)
        if unread:
            raise CheckpointError(f"tensors {sorted(unread)} that belong to no layer")
        body["example"] = unpack(body["example"], {int(name[8:]): read_tensor(path, name, device) for name in examples})
        body["watched"] = tuple(body["watched"])
        body.setdefault("clip", None)  # which older files do not have
        if isinstance(body["mask"], dict):
            body["mask"] = LeaveOut(**body["mask"])
        found = {fact: body[fact] for fact in FACTS}
    except (LowRankError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, LowRankError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: is damaged, or holds no statistics: {what}.") from None
    return layers, found


@dataclass(frozen=True)
class _File:
    """A file of statistics.

    Args:
        path: the file.
        stamp: what tells it from another one at its place.
        device: where tensors go.
    """

    path: Path
    stamp: tuple[int, ...]
    device: str

    def unread(self, name: str, shape: tuple[int, ...]) -> Unread:
        return Unread(shape, partial(self.read, name))

    def read(self, name: str) -> Tensor:
        if not self.path.is_file() or _stamp(self.path) != self.stamp:
            raise CheckpointError(f"{self.path}: was replaced since its statistics were loaded; load them again.")
        return read_tensor(self.path, name, self.device).double()


def _around_zero(mean: Unread, second: Unread) -> Tensor:
    """``E[x x^T]`` of the mean and the covariance; a diagonal as it is, since one-hot rows are not centred."""
    if mean.shape == second.shape:
        return second.read()
    center = mean.read()
    return second.read().addcmul_(center[..., :, None], center[..., None, :])


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _packed(example: Any) -> tuple[Any, dict[str, Tensor]]:
    """The example as JSON can hold it, and its tensors by their names in the file; nothing where a file cannot."""
    tensors: list[Tensor] = []
    try:
        packed = pack(example, tensors)
    except TypeError:
        return None, {}
    if any(tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided for tensor in tensors):
        return None, {}
    return packed, {f"example.{index}": tensor for index, tensor in enumerate(tensors)}


def _rounded(name: str, value: Value, dtype: torch.dtype) -> Tensor:
    tensor = read(value)
    largest = max(abs(float(end)) for end in tensor.aminmax()) if dtype == torch.float32 else 1.0
    if largest and not SMALLEST < largest < LARGEST:
        raise LowRankError(
            f"Statistics.save: the largest entry of {name!r} is {largest:.0e}, which float32 does not hold; save in"
            " torch.float64."
        )
    return tensor.to(dtype)


def _check_shapes(name: str, inputs: Moments, tensors: Mapping[str, Unread | None]) -> None:
    """Raises for tensors that do not fit each other."""
    mean = vars(inputs)["mean"].shape
    square, gradients = (*mean, *mean[-1:]), tensors["gradients"]
    fits = vars(inputs)["second"].shape in (mean, square)
    if gradients is not None:
        outputs, columns = gradients.shape[-2:]  # fewer columns where it is a sketch
        fits &= gradients.shape[:-2] == mean[:-1] and columns <= outputs
    for key, shape in (("cross", square), ("target_mean", mean)):
        value = tensors[key]
        fits &= value is None or value.shape == shape
    if not fits:
        raise CheckpointError(f"tensors of {name!r} that do not fit each other")
