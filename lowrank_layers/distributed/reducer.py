"""Low-rank averaging of named gradients, and its state; what DDP's and FSDP2's states share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import LowRankError
from .collectives import Collectives
from .error_feedback import GradientMemory
from .exchange import bytes_on_wire
from .fallback import Fallback
from .matricize import unmatricize
from .powersgd import PowerSGD
from .rank_selection import RankSelection
from .settings import PowerSGDSettings
from .sparse_gradients import dense_parameters, nbytes
from .state_dict import Snapshot, from_tensors, to_tensors
from .stats import CommStats


@dataclass(frozen=True)
class Step:
    """What the buckets of one step have in common.

    Args:
        number: number of the step.
        loss_scale: factor on the loss, and so on the gradients.
        compress: whether gradients are compressed.
    """

    number: int
    loss_scale: float
    compress: bool


class LowRankReducer:
    """Averages gradients at low rank, and keeps errors, warm starts and ranks by parameter name.

    Args:
        settings: how gradients are averaged.
        collectives: the processes.
        model: gives the parameters their names; without it the state cannot be saved.
        scaler: a ``GradScaler``, whose scale the errors follow.

    Raises:
        LowRankError: for a scaler that is none.
    """

    fallback: Fallback | None = None  # set where the state of a hook was asked for it

    def __init__(
        self, settings: PowerSGDSettings, collectives: Collectives, model: nn.Module | None, scaler: Any
    ) -> None:
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise LowRankError(f"LowRankCommState: got scaler {type(scaler).__name__}, expected a GradScaler.")
        self.settings, self.collectives, self.scaler = settings, collectives, scaler
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.step = 0
        self._memories: dict[str, GradientMemory] = {}
        self._ranks = RankSelection(settings)
        self._powersgd = PowerSGD(settings, collectives)
        self._stats = CommStats()

    def state_dict(self) -> dict[str, Tensor]:
        """The step, and ranks, directions and errors by parameter name; keys of errors also name the process.

        They are plain tensors for ``torch.save`` and ``safetensors`` (one file per process) and for
        ``torch.distributed.checkpoint`` (one folder for all processes).

        Raises:
            LowRankError: without ``model``, or before ``init_process_group``.
        """
        self._require_model("state_dict")
        memories = self._memories
        if not memories:  # so that torch.distributed.checkpoint has tensors to load into
            new = {name: self._new_memory(name, p) for name, p in self._parameters().items() if p.requires_grad}
            memories = {name: memory for name, memory in new.items() if memory is not None}
        compress = None if self.fallback is None else self.fallback.compress
        return to_tensors(Snapshot(self.step, self._ranks.chosen, self._ranks.spent, compress, memories))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resumes from a state of this process, or from one of :func:`merge_comm_states`.

        Args:
            state: what :meth:`state_dict` or :func:`merge_comm_states` returned.

        Raises:
            LowRankError: without ``model``, before ``init_process_group``, or for a state of another model, rank or
                number of processes; then nothing is changed.
        """
        self._require_model("load_state_dict")
        parameters = self._parameters()
        snapshot = from_tensors(state, parameters, self.settings)
        chooses = self._ranks.fixed is None and self.fallback is None and any(p.ndim > 1 for p in parameters.values())
        if chooses and snapshot.step > self.settings.start_step and not snapshot.ranks:
            raise LowRankError(
                "load_state_dict: this state has no ranks, and a rule gave them. torch.distributed.checkpoint loads"
                " only what a fresh state_dict() has; load with torch.load or safetensors."
            )
        self.step, self._ranks.chosen, self._ranks.spent, compress, self._memories = snapshot
        if self.fallback is not None:
            self.fallback.compress = compress

    def stats(self) -> dict[str, Any]:
        """Bytes sent and saved, and seconds of computing and of exchanging (waiting for others included).

        Under ``layers``, by parameter name: its rank, the bytes per step and how many times fewer than in fp32 they
        are, the norm of the error, the bytes that are remembered, and the seconds that its products took.
        """
        layers = {name: self._layer_stats(memory) for name, memory in self._memories.items()}
        return {"steps": self.step, **self._stats.summary(self.collectives.stopwatch.seconds), "layers": layers}

    def _layer_stats(self, memory: GradientMemory) -> dict[str, float]:
        stack, rows, columns = memory.shape
        sent = sum(bytes_on_wire(stack * memory.rank * side, self.settings.wire) for side in (rows, columns))
        sent //= 2 if self.settings.alternate else 1
        return {
            "rank": memory.rank,
            "bytes": sent,
            "ratio": 4 * stack * rows * columns / sent,
            "residual": float(torch.linalg.vector_norm(memory.error, dtype=torch.float64)),
            "bytes_kept": memory.nbytes(),
            "seconds": memory.stopwatch.seconds,
        }

    def _parameters(self) -> dict[str, Tensor]:
        """The parameters with dense gradients, by name."""
        return {} if self.model is None else dense_parameters(self.model)

    def _require_model(self, who: str) -> None:
        if self.model is None:
            raise LowRankError(
                f"{who}: this LowRankCommState has no names of parameters; give it model= to save or load it."
            )

    def _loss_scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _average(self, bucket: Tensor, named: Sequence[tuple[str, Tensor]], step: Step) -> None:
        """Averages a bucket in place.

        Args:
            bucket: flat tensor of all its gradients, or one sparse gradient.
            named: the dense gradients with their names, views of the bucket.
            step: the step.
        """
        start = time.perf_counter()
        whole = nbytes(bucket)
        self.collectives.node_mean_(bucket)
        if bucket.is_sparse:
            self.collectives.mean_(bucket)
            sent = whole
        elif not step.compress:
            sent = self._average_whole(bucket, named, step)
        elif self._ranks.known(named):
            pairs = [(gradient, self._memory(name, gradient, step)) for name, gradient in named]
            sent = self._powersgd.average_(bucket, pairs, step.number)
        else:
            self.collectives.mean_(bucket)
            sent = whole
            self._ranks.observe(named)
        self._stats.add(sent, whole, time.perf_counter() - start)

    def _average_whole(self, bucket: Tensor, named: Sequence[tuple[str, Tensor]], step: Step) -> int:
        """Averages a bucket uncompressed, together with the errors that are left; returns the bytes sent."""
        left = [(name, gradient) for name, gradient in named if name in self._memories]
        for name, gradient in left:
            self._memories[name].rescale(step.loss_scale)
            gradient.add_(unmatricize(self._memories[name].error, gradient.shape))
        narrow = bucket.to(self._whole_dtype(bucket))
        self.collectives.mean_(narrow)
        if narrow is not bucket:
            bucket.copy_(narrow)
        if left and bool(torch.isfinite(bucket).all()):
            for name, _ in left:
                del self._memories[name]
        return narrow.nbytes

    def _whole_dtype(self, bucket: Tensor) -> torch.dtype:
        """The dtype in which an uncompressed bucket is sent."""
        return bucket.dtype if self.fallback is None or self.fallback.dtype is None else self.fallback.dtype

    def _memory(self, name: str, gradient: Tensor, step: Step) -> GradientMemory | None:
        """The memory of a gradient; ``None`` where it is not compressed."""
        if name not in self._memories:
            new = self._new_memory(name, gradient)
            if new is None:
                return None
            new.scale = step.loss_scale
            self._memories[name] = new
        self._memories[name].rescale(step.loss_scale)
        return self._memories[name]

    def _new_memory(self, name: str, gradient: Tensor) -> GradientMemory | None:
        rank = self._ranks.rank_of(name, gradient)
        return None if rank is None else GradientMemory(name, gradient, rank, self.settings)
