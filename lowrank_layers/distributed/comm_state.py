"""The state of the communication hook of DistributedDataParallel."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import LowRankError
from ..rank import Budget, Rank
from ..settings import settings_from
from .collectives import Collectives
from .fallback import Fallback
from .reducer import LowRankReducer, Step
from .settings import PowerSGDSettings
from .sparse_gradients import nbytes
from .worker_thread import WorkerThread


class LowRankCommState(LowRankReducer):
    r"""Averages gradients over processes at low rank (PowerSGD): ``ddp.register_comm_hook(state, lr.low_rank_hook)``.

    Each gradient plus the error of the step before, a matrix :math:`M`, is sent as two factors: :math:`P = M Q` is
    averaged and made orthonormal, then :math:`Q = M^T P` is averaged, and the gradient becomes :math:`P Q^T`. What a
    process's own :math:`P Q_i^T` lacks of its :math:`M_i` is its next error (error feedback), so that nothing is lost.

    The state is kept by parameter, so that it outlives rebuilt buckets. All collectives go through a process group of
    its own and one thread, in the same order in every process. The state may be made before ``init_process_group``, but
    not saved or loaded. A gradient that is not finite in any process leaves the state unchanged and is averaged
    uncompressed, so that a ``GradScaler`` sees it. A gradient that is zero in every process stays zero and its error is
    kept, since DDP would drop what an unused parameter were given. Sparse gradients (``nn.Embedding(sparse=True)``) are
    averaged uncompressed, by backends that support them, such as gloo, and count in no budget.

    Args:
        settings: the rank, or all options as :class:`PowerSGDSettings`; ``None`` is the default of each.
        model: gives the parameters their names; without it the state cannot be saved.
        process_group: the processes that share gradients; ``None`` is all of them.
        node_group: the processes of one node. Gradients are averaged among them uncompressed, and ``process_group``
            has one process per node.
        scaler: a ``GradScaler``, whose changes of scale the errors follow.
        fallback: times some steps with and without compression, and sends uncompressed gradients where the link is
            so fast that compression is slower. A dtype (fp16, bf16) is what they are then sent in; values that
            overflow it become infinite.
        timeout: time limit of a collective. When a process is lost or later than that, ``backward`` raises in the
            others.
        **options: fields of :class:`PowerSGDSettings`, such as ``rank=4``; they replace those of ``settings``.

    Raises:
        LowRankError: for an option that does not exist or is out of range.

    Examples:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> ddp = nn.parallel.DistributedDataParallel(nn.Linear(64, 64))
        >>> state = lr.LowRankCommState(rank=4, model=ddp.module)
        >>> ddp.register_comm_hook(state, lr.low_rank_hook)
        >>> ddp(torch.randn(8, 64)).square().mean().backward()
        >>> int(torch.linalg.matrix_rank(ddp.module.weight.grad))
        4
        >>> dist.destroy_process_group()

    Reference:
        Vogels et al., PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, NeurIPS 2019.
    """

    def __init__(
        self,
        settings: PowerSGDSettings | Rank | Budget | None = None,
        *,
        model: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        node_group: dist.ProcessGroup | None = None,
        scaler: Any = None,
        fallback: bool | torch.dtype = False,
        timeout: timedelta | None = None,
        **options: Any,
    ) -> None:
        chosen = settings_from(PowerSGDSettings, settings, options, "LowRankCommState")
        if not isinstance(fallback, bool) and fallback not in (torch.float16, torch.bfloat16):
            raise LowRankError(
                f"LowRankCommState: got fallback={fallback!r}, expected a bool, torch.float16 or torch.bfloat16."
            )
        super().__init__(chosen, Collectives(process_group, node_group, timeout), model, scaler)
        if fallback:
            self.fallback = Fallback(fallback if isinstance(fallback, torch.dtype) else None)
        self._thread = WorkerThread()
        self._names = WeakTensorKeyDictionary()
        self._current = Step(0, 1.0, True)
        self._uses_thread = True

    def submit(self, bucket: GradBucket) -> Future[Tensor]:
        """Averages a bucket in the background; returns a future, as a communication hook does.

        Args:
            bucket: a bucket of gradients, from DDP.
        """
        self.collectives.start()
        if bucket.index() == 0:
            self._begin_step()
        step, buffer, last = self._current, bucket.buffer(), bucket.is_last()
        if last:
            self.step += 1
        if not self._uses_thread:
            return self._all_reduce(buffer)
        # DDP gives a sparse gradient a bucket of its own, which cannot be taken apart by gradients()
        pairs = [] if buffer.is_sparse else list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        named = [(self._name(parameter), gradient) for parameter, gradient in pairs]

        def job() -> Tensor:
            self._average(buffer, named, step)
            if step.compress:
                self._ranks.choose(self.collectives, buffer.device, last=last)
            if last and self.fallback is not None:
                self._measure(self.fallback, step, buffer.device)
            return buffer

        return self._thread.submit(job, buffer.device)

    def factors(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """The factors ``[rows, rank]`` and ``[columns, rank]`` whose product is the last averaged gradient of a matrix.

        Args:
            parameter: a parameter of the model.

        Returns:
            The factors; ``None`` before the first compressed step, and for a gradient that is no compressed matrix.
        """
        memory = self._memories.get(self._names.get(parameter, ""))
        if memory is None or memory.last_factors is None or parameter.ndim != 2:
            return None
        left, right = memory.last_factors
        return left[0], right[0]

    def _begin_step(self) -> None:
        """Decides what holds for all buckets: within a step, the thread may forget memories."""
        fallback = self.fallback
        compress = self.step >= self.settings.start_step and (fallback is None or fallback.compress_next)
        measures = fallback is not None and fallback.compress is None
        self._current = Step(self.step, self._loss_scale(), compress)
        self._uses_thread = compress or measures or bool(self._memories) or self.collectives.node_group is not None

    def _all_reduce(self, buffer: Tensor) -> Future[Tensor]:
        """Averages a bucket as DDP does without a hook: asynchronously, and without the thread."""
        # a sparse gradient is averaged in place; DDP copies it into the parameter's gradient, which it is already
        averaged = buffer.div_(self.collectives.size)
        if not buffer.is_sparse:
            averaged = averaged.to(self._whole_dtype(buffer))
        self._stats.add(nbytes(averaged), nbytes(buffer), 0.0)
        work = dist.all_reduce(averaged, group=self.collectives.group, async_op=True)

        def result(done: Future[list[Tensor]]) -> Tensor:
            mean = done.value()[0]  # raises where the collective has failed
            return buffer if averaged is buffer else buffer.copy_(mean)

        future: Future[Tensor] = work.get_future().then(result)
        return future

    def _measure(self, fallback: Fallback, step: Step, device: torch.device) -> None:
        fallback.record(step.compress)
        if fallback.ready():
            seconds = fallback.seconds_per_step().to(device)
            self.collectives.max_(seconds)
            fallback.choose(seconds)

    def _name(self, parameter: Tensor) -> str:
        if parameter not in self._names:
            if self.model is None:
                self._names[parameter] = f"parameter{len(self._names)}"
            else:
                self._names.update({p: name for name, p in self.model.named_parameters()})
        if parameter not in self._names:
            raise LowRankError(
                "low_rank_hook: a bucket has a parameter that is not in model=; give the model that DDP wraps."
            )
        name: str = self._names[parameter]
        return name
