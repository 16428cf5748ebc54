"""What a device can hold and compute, as a budget."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from ..checks import is_number
from ..errors import BudgetError
from .budget import Budget


@dataclass(frozen=True)
class Device:
    """A device that a model is to run on.

    Args:
        memory: bytes that the parameters of a model may take; ``None`` is no limit.
        macs_per_second: multiply-accumulates per second that a model reaches on it, such as ``macs * batch / latency``
            of what :func:`evaluate` returns there. ``None`` stands for the machine on which :func:`make_plan` runs,
            where layers are timed.

    Raises:
        BudgetError: unless both are positive numbers or ``None``.

    Examples:
        >>> lr.Device(memory=100_000_000).budget(latency=0.5)
        Budget(bytes=100000000, latency=0.5)
        >>> from datetime import timedelta
        >>> lr.Device(memory=2_000_000, macs_per_second=1e9).budget(latency=timedelta(milliseconds=20))
        Budget(macs=20000000, bytes=2000000)
    """

    memory: int | None = None
    macs_per_second: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "macs_per_second"):
            value = getattr(self, name)
            if value is not None and (not is_number(value) or not 1 <= value < float("inf")):
                raise BudgetError(f"Device: got {name}={value!r}, expected a positive number, as in memory=2_000_000.")

    def budget(self, *, latency: float | timedelta | None = None, loss: float | None = None) -> Budget:
        """Returns the budget of a model that runs on the device.

        Args:
            latency: time that one forward pass may take, as in :class:`Budget`: a ``timedelta``, or a fraction of what
                it takes now. With ``macs_per_second`` it becomes a limit on multiply-accumulates, which counts one
                sample.
            loss: limit on the predicted growth of the loss.

        Raises:
            BudgetError: for no limit at all, or one that :class:`Budget` refuses.
        """
        memory = None if self.memory is None else int(self.memory)
        if self.macs_per_second is None or latency is None:
            return Budget(bytes=memory, latency=latency, loss=loss)
        if isinstance(latency, timedelta):
            macs: int | float = int(self.macs_per_second * latency.total_seconds())
        else:
            macs = latency
        return Budget(bytes=memory, macs=macs, loss=loss)
