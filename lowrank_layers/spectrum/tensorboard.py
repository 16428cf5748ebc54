"""Records as scalars of TensorBoard."""

from __future__ import annotations

import os
from typing import Protocol

from ..errors import LowRankError, MissingExtraError
from .record import SpectrumRecord


class ScalarWriter(Protocol):
    """The method of ``SummaryWriter`` that is called; tensorboardX's has it as well."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Writes a value."""


class TensorBoard:
    """Writes the norms, the stable rank and the singular values of every matrix as scalars.

    Args:
        writer: a ``SummaryWriter``, or a folder for a new one.

    Raises:
        LowRankError: for anything else.
        MissingExtraError: for a folder, if TensorBoard is not installed.
    """

    def __init__(self, writer: ScalarWriter | str | os.PathLike[str]) -> None:
        if isinstance(writer, (str, os.PathLike)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingExtraError(
                    f"SpectrumMonitor: got tensorboard={os.fspath(writer)!r}, but TensorBoard is not installed:"
                    " pip install tensorboard."
                ) from None
            writer = SummaryWriter(os.fspath(writer))
        if not callable(getattr(writer, "add_scalar", None)):
            raise LowRankError(
                f"SpectrumMonitor: got tensorboard={writer!r}, expected a folder or a SummaryWriter (with add_scalar)."
            )
        self.writer = writer

    def __call__(self, record: SpectrumRecord) -> None:
        """Writes a record."""
        for name, spectrum in record.items():
            scalars = {"frobenius_norm": spectrum.frobenius_norm, "stable_rank": spectrum.stable_rank}
            scalars |= {f"singular_value_{i}": value for i, value in enumerate(spectrum.singular_values, 1)}
            for key, value in scalars.items():
                self.writer.add_scalar(f"{name}/{key}", value, record.step)
