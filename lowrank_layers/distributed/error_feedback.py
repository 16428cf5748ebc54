"""What a process remembers of a gradient between steps: its error feedback and its warm start."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..linalg import to_unit
from .matricize import matricized_shape
from .microscaling import pack, padded, unpack
from .settings import PowerSGDSettings
from .stats import Stopwatch


class GradientMemory:
    """The error and the directions of one gradient, seen as a stack of matrices.

    Args:
        name: name of the parameter; it seeds the random directions, so that they are the same in every process.
        gradient: a tensor of the gradient's shape, on its device.
        rank: rank of the approximation, at most full rank.
        settings: dtype of the error, warm start and refresh.
    """

    def __init__(self, name: str, gradient: Tensor, rank: int, settings: PowerSGDSettings) -> None:
        shape = matricized_shape(gradient.shape)
        assert shape is not None
        self.shape, self.device, self.settings = shape, gradient.device, settings
        self.rank = min(rank, *shape[1:])
        self.key = zlib.crc32(name.encode())
        self.scale = 1.0
        self.error = torch.zeros(shape, device=self.device)
        self.right = self._random(0, shape[2])
        self.left = self._random(0, shape[1]) if settings.alternate else None
        self.last_factors: tuple[Tensor, Tensor] | None = None
        self.stopwatch = Stopwatch()
        self._spares: dict[int, Tensor] = {}

    @property
    def error(self) -> Tensor:
        """What this process has not sent yet; its mean over processes is what is missing in the averaged gradients."""
        if self.settings.error_dtype != torch.int8:
            return self._error
        stack, rows, columns = self.shape
        return unpack(self._error, 8)[0, : stack * rows * columns].view(self.shape)

    @error.setter
    def error(self, value: Tensor) -> None:
        if self.settings.error_dtype == torch.int8:
            flat = value.to(self.device, torch.float32).flatten()
            self._error = pack(pad(flat, (0, padded(flat.numel()) - flat.numel())).unsqueeze(0), 8)
        elif hasattr(self, "_error"):
            self._error.copy_(value)
        else:
            self._error = value.to(self.device, self.settings.error_dtype, copy=True)

    @property
    def full_rank(self) -> bool:
        """Whether the approximation is exact."""
        return self.rank == min(self.shape[1:])

    def nbytes(self) -> int:
        """Bytes of the error and the directions."""
        left = self.left if self.last_factors is None else self.last_factors[0]
        return sum(t.nbytes for t in (self._error, self.right, left, *self._spares.values()) if t is not None)

    def rescale(self, loss_scale: float) -> None:
        """Multiplies the error as the scale of the loss has changed."""
        if loss_scale != self.scale:
            self.error = self.error * (loss_scale / self.scale)
            self.scale = loss_scale

    def basis(self, step: int, *, left: bool) -> Tensor:
        """Orthonormal directions to multiply with in this step.

        Args:
            step: number of the step.
            left: gives directions ``[stack, rows, rank]`` rather than ``[stack, columns, rank]``.
        """
        directions = self.left if left and self.left is not None else self.right
        refresh = self.settings.refresh
        if not self.settings.warm_start or (refresh is not None and step % refresh == 0):
            directions = self._random(step, directions.shape[1])
        # the QR of zero columns gives the same unit vectors every time, which may be orthogonal to every gradient
        zero = torch.linalg.vector_norm(to_unit(directions), dim=1, keepdim=True) < 1e-20
        basis: Tensor = torch.linalg.qr(torch.where(zero, self._spare(directions.shape[1]), directions)).Q
        return basis

    def keep_factors(self, left: Tensor, right: Tensor) -> None:
        """Stores the factors of the averaged gradient, the directions of the next step."""
        self.last_factors = left.contiguous(), right.contiguous()
        self.right = self.last_factors[1]
        if self.left is not None:
            self.left = self.last_factors[0]

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what a state dict has to hold."""
        tensors = {"right": self.right.detach().clone(), "error": self.error.detach().clone()}
        if self.left is not None:
            tensors["left"] = self.left.detach().clone()
        return tensors | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        self.error = tensors["error"]
        self.right.copy_(tensors["right"])
        if self.left is not None and "left" in tensors:
            self.left.copy_(tensors["left"])
        self.scale = float(tensors["scale"])

    def _spare(self, size: int) -> Tensor:
        """Random directions that stand in for zero ones, drawn once."""
        if size not in self._spares:
            self._spares[size] = self._random(-1, size)
        return self._spares[size]

    def _random(self, step: int, size: int) -> Tensor:
        """Random directions of a step, the same in every process; the global generator is not used."""
        generator = torch.Generator().manual_seed(self.key + 1_000_003 * step)
        return torch.randn(self.shape[0], size, self.rank, generator=generator).to(self.device)
