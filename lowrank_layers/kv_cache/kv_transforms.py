"""The transforms of a model's keys and values, and the file that is stored beside the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from ..errors import CheckpointError, LowRankError
from ..files import read_tensors, write_tensors
from .bit_fit import BitPlan, plan_bits
from .rope import Rotation
from .settings import KVSettings
from .transform import Transform

NAME = "kv_transforms.safetensors"
"""The name of the file in a model's folder."""
KEY = "lowrank_layers.kv_transforms"
VERSION = 1
SIDES = ("keys", "values")

Pair = tuple[Transform, Transform]


@dataclass(frozen=True, eq=False)
class KVTransforms(Sequence[Pair]):
    """The transforms of keys and of values, one pair per layer, as :func:`kv_subspaces` makes them with ``bits``.

    Variances are in nats per token: to second order, it costs at most half a variance to leave out its direction. So
    they can be compared between layers, and between keys and values.

    Args:
        layers: the transforms of keys and of values, layer by layer.
        head_size: number of entries per head.
        joint: whether all heads share a transform.
        rope: how the rotary position embedding of keys is treated, as in :class:`KVSettings`.
        rotations: the rotation of the keys of each layer; ``None`` where none was needed.

    Examples:
        >>> import tempfile
        >>> model = nn.ModuleDict({"k_proj": nn.Linear(8, 16), "v_proj": nn.Linear(8, 16)})
        >>> model.forward = lambda x: model["k_proj"](x) * model["v_proj"](x)
        >>> stats = lr.calibrate(model, [torch.randn(4, 25, 8)], lr.SampledCrossEntropy())
        >>> made = lr.kv_subspaces(model, stats, lr.KVSettings(bits=2), head_size=8, rotation=lr.Rotation.of(8))
        >>> folder = tempfile.mkdtemp()
        >>> made.save(folder)
        >>> len(lr.KVTransforms.load(folder)), made.nbytes()
        (1, 4352)
    """

    layers: tuple[Pair, ...]
    head_size: int
    joint: bool
    rope: str
    rotations: tuple[Rotation | None, ...]

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Pair, ...]: ...
    def __getitem__(self, index: int | slice) -> Pair | tuple[Pair, ...]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __deepcopy__(self, memo: object) -> KVTransforms:
        return self  # nothing in it is ever written to

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        transforms = (transform for pair in self.layers for transform in pair)
        return sum(tensor.nbytes for each in transforms for tensor in vars(each).values() if tensor is not None)

    def check(self, settings: KVSettings) -> None:
        """Raises if a cache with these settings has keys and values of another form.

        Args:
            settings: settings of the cache.

        Raises:
            LowRankError: for a rank, and for another ``rope`` or ``joint``.
        """
        if settings.by_rank:
            raise LowRankError("KVTransforms: got a cache with a rank, expected one with bits; give bits=.")
        for name, own, asked in (("rope", self.rope, settings.rotated), ("joint", self.joint, settings.joint)):
            if asked is not None and own != asked:
                raise LowRankError(
                    f"KVTransforms: were made with {name}={own!r}, and the cache has {name}={asked!r}; calibrate again"
                    f" with it, or give the cache {name}={own!r}."
                )

    def plans(self, bits: float) -> list[BitPlan]:
        """The bits of all directions of all layers, kept for all caches that ask for as many.

        Args:
            bits: mean number of bits per entry.
        """
        if bits not in self._plans:
            self._plans[bits] = plan_bits(self.layers, bits, shared=True)
        return self._plans[bits]

    @cached_property
    def _plans(self) -> dict[float, list[BitPlan]]:
        return {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, with bases in bfloat16: rounding them adds less than 0.01 % to the error.

        Args:
            path: the file, or the folder of a model, in which it is called ``kv_transforms.safetensors``.

        Raises:
            CheckpointError: for a folder that does not exist.
        """
        path = _file(path)
        turned: list[Rotation] = []
        tensors: dict[str, Tensor] = {}
        for layer, pair in enumerate(self.layers):
            for side, transform in zip(SIDES, pair, strict=True):
                prefix = f"{layer}.{side}."
                tensors[f"{prefix}mean"] = transform.mean.float()
                tensors[f"{prefix}basis"] = transform.basis.bfloat16()
                tensors[f"{prefix}variances"] = transform.variances.float()
        places = [None if rotation is None else _place(rotation, turned) for rotation in self.rotations]
        tensors |= {f"rotations.{index}": rotation.frequencies for index, rotation in enumerate(turned)}
        body = {
            "version": VERSION,
            "head_size": self.head_size,
            "joint": self.joint,
            "rope": self.rope,
            "rotations": [[rotation.interleaved, rotation.start] for rotation in turned],
            "layers": places,
        }
        owned = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        write_tensors(path, owned, KEY, body)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> KVTransforms:
        """Reads what :meth:`save` wrote.

        Args:
            path: the file, or the folder of a model with ``kv_transforms.safetensors`` in it.
            device: the device on which the tensors are put.

        Raises:
            CheckpointError: for a file that is missing, torn or foreign.
        """
        path = _file(path)
        foreign = f"was not written by KVTransforms.save (no {KEY!r} in its metadata)."
        body, tensors = read_tensors(path, KEY, foreign)
        try:
            if body["version"] != VERSION:
                raise CheckpointError(f"format version {body['version']!r}, expected {VERSION}; update the package")
            turned = [
                Rotation(tensors.pop(f"rotations.{index}").to(device), *kind)
                for index, kind in enumerate(body["rotations"])
            ]
            layers = tuple(_pair(layer, tensors, device) for layer in range(len(body["layers"])))
            rotations = tuple(None if place is None else turned[place] for place in body["layers"])
            if tensors:
                raise CheckpointError(f"tensors {sorted(tensors)} that belong to no layer")
            return cls(layers, body["head_size"], body["joint"], body["rope"], rotations)
        except (LowRankError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            what = str(error) if isinstance(error, LowRankError) else f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: is damaged, or holds no transforms: {what}.") from None


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / NAME if path.is_dir() else path


def _place(rotation: Rotation, known: list[Rotation]) -> int:
    """The index of a rotation among those that layers share, to which it is added if it is new."""
    for index, other in enumerate(known):
        if other.equals(rotation):
            return index
    known.append(rotation)
    return len(known) - 1


def _pair(layer: int, tensors: dict[str, Tensor], device: torch.device | str) -> Pair:
    keys, values = (_transform(f"{layer}.{side}.", tensors, device) for side in SIDES)
    return keys, values


def _transform(prefix: str, tensors: dict[str, Tensor], device: torch.device | str) -> Transform:
    """Takes the tensors of a transform out of those that are left."""
    mean, basis, variances = (tensors.pop(prefix + name).float() for name in ("mean", "basis", "variances"))
    if basis.shape != (*mean.shape, mean.shape[-1]) or variances.shape != mean.shape or len(mean) != 1:
        raise CheckpointError(f"tensors of {prefix} that do not fit each other")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (mean, basis, variances)):
        raise CheckpointError("NaN or Inf among the entries")
    # B^T G B = 1 for a square basis: the metric is (B B^T)^-1, and belongs to the basis as it is rounded
    inverse = torch.linalg.inv(basis.double())
    found = (mean, basis, variances, (inverse.mT @ inverse).float())
    return Transform(*(tensor.to(device) for tensor in found))
