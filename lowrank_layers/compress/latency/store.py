"""Measured times that are kept, in memory and on disk, by the machine on which they hold."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from typing import ClassVar

import torch

from ...files import cache_folder, replacing


class TimeStore:
    """Times of replacements over those of the layers that they replace.

    They are kept in :func:`cache_folder`, in one file for each machine, device, number of threads and version of torch.
    Where there is no such file, or no folder that can be written to, they are measured anew in each process.

    Args:
        device: the device of the model.
    """

    _known: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self, device: torch.device) -> None:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.environment = {
            "machine": platform.node(),
            "device": where,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        digest = hashlib.sha256(json.dumps(self.environment).encode()).hexdigest()[:16]
        self.path = cache_folder() / f"latency_{digest}.json"
        if str(self.path) not in self._known:
            self._known[str(self.path)] = self._read()
        self.ratios = self._known[str(self.path)]

    def save(self) -> None:
        """Writes the times, with those that other processes have added meanwhile."""
        body = {"environment": self.environment, "ratios": {**self._read(), **self.ratios}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(body, indent=1), encoding="utf-8")
        except OSError:
            return

    def _read(self) -> dict[str, float]:
        try:
            ratios = json.loads(self.path.read_text(encoding="utf-8"))["ratios"]
            return {str(key): float(ratio) for key, ratio in ratios.items() if math.isfinite(ratio) and ratio > 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
