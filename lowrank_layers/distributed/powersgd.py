"""What a low-rank gradient hook knows: ranks, warm starts, errors, its own process group and worker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
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
from .collectives import Mean, place
from .error_feedback import ERROR_DTYPES, Kept, Memory
from .exchange import WIRE_DTYPES, bytes_on_wire
from .fallback import Link
from .matrices import gradient_of, matrix_shape
from .ranks import Ranks
from .reduce import How, Piece, reduce_
from .sparse import dense_parameters, nbytes
from .state_dict import Known, load, saved
from .traffic import Traffic
from .worker import Worker


class LowRankCommState:
    r"""Averages gradients as :math:`P Q^T` over processes: for ``ddp.register_comm_hook(state, lr.low_rank_hook)``.

    Every gradient with an error from the step before, :math:`M`, is sent as :math:`P = M Q` (averaged, made
    orthonormal) and :math:`Q = M^T P` (averaged). What a process' own :math:`P Q_i^T` lacks of its :math:`M_i` is its
    next error (PowerSGD; Vogels et al., 2019, algorithm 2): errors stay bounded in every process, and their mean is
    what all owe together.

    The state is kept by parameter, so that it outlives rebuilt buckets; collectives go through a process group of their
    own and one worker, so that they go out in one order everywhere. The state may be made before
    ``init_process_group``, but not saved or loaded. A gradient that is not finite in any process leaves the state as it
    was and is averaged as it is, for a ``GradScaler`` to see. One that is zero in every process stays zero and its
    error is kept, since DDP would throw away what an unused parameter were given. Sparse gradients
    (``nn.Embedding(sparse=True)``) are averaged as they are, by a backend that takes them, as gloo does, and no budget
    counts them.

    Args:
        rank: of every gradient: an integer, a rule that looks at the singular values of the averaged gradient of step
            ``start_step`` (``RelativeError`` bounds what is left over, relative to the gradient), or
            ``Budget(bytes=)``: what a step may send (with ``alternate`` the mean of two), shared out for the least
            error of all. Gradients of a layer that is unfrozen later have to fit into what is left.
        model: names the parameters; without it the state cannot be saved.
        start_step: averages whole gradients before.
        process_group: of the processes that share gradients; ``None`` is all of them.
        node_group: processes of one node: gradients are averaged among them as they are, and ``process_group`` joins
            those of the same place in each node.
        saving: a gradient whose factors are not smaller by that factor is sent whole.
        alternate: sends :math:`P` and :math:`Q` in turn, one collective a step (ACP-SGD; Zhang et al., 2023).
        refresh: steps after which directions are drawn anew; ``None`` never does.
        local_iterations: steps of subspace iteration that each process makes on its own matrix before the first
            product is sent: better directions for no bytes, at two products each. Not with ``alternate``.
        wire: dtype on the wire; ``None`` is fp32. What overflows fp16 goes out again in fp32. ``torch.int8`` sends
            factors as MXINT8 and the rest with 16 bits, in two exchanges (all-to-all, all-gather).
        error_dtype: what is left over is remembered in: fp32, bf16, or int8 (as MXINT8).
        error_feedback: adds what was left over to the next gradient.
        warm_start: goes on from the last directions.
        scaler: a ``GradScaler`` whose changes of scale the errors follow.
        fallback: measures both ways, some steps each, and sends whole gradients where the link is fast enough that
            compression loses; given a dtype (fp16, bf16), it sends them in it, and what overflows it is infinite.
        timeout: of a collective; ``backward`` raises in the others when a process is gone or later than that.

    Raises:
        LowRankError: for a setting that is out of range.

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
    """

    def __init__(
        self,
        rank: Rank | Budget = 4,
        *,
        model: nn.Module | None = None,
        start_step: int = 0,
        process_group: dist.ProcessGroup | None = None,
        node_group: dist.ProcessGroup | None = None,
        saving: float = 1.0,
        alternate: bool = False,
        refresh: int | None = None,
        local_iterations: int = 1,
        wire: torch.dtype | None = None,
        error_dtype: torch.dtype = torch.float32,
        error_feedback: bool = True,
        warm_start: bool = True,
        scaler: Any = None,
        fallback: bool | torch.dtype = False,
        timeout: timedelta | None = None,
    ) -> None:
        for what, value, least in (
            ("start_step", start_step, 0),
            ("refresh", refresh, 1),
            ("local_iterations", local_iterations, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise LowRankError(f"LowRankCommState: got {what}={value!r}, expected an integer of at least {least}.")
        if error_dtype not in ERROR_DTYPES:
            raise LowRankError(f"LowRankCommState: got error_dtype={error_dtype}, expected one of {ERROR_DTYPES}.")
        if wire is not None and wire not in WIRE_DTYPES:
            raise LowRankError(f"LowRankCommState: got wire={wire}, expected None or one of {list(WIRE_DTYPES)}.")
        if not isinstance(fallback, bool) and fallback not in (torch.float16, torch.bfloat16):
            raise LowRankError(
                f"LowRankCommState: got fallback={fallback!r}, expected a bool, torch.float16 or torch.bfloat16."
            )
        if not saving > 0:
            raise LowRankError(f"LowRankCommState: got saving={saving!r}, expected a positive number.")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise LowRankError(f"LowRankCommState: got scaler {type(scaler).__name__}, expected a GradScaler.")
        self.ranks = Ranks(rank, wire, 1 if alternate else 2, saving)
        self.mean = Mean(process_group, node_group, timeout)
        self.worker = Worker()
        self.start_step = start_step
        self.how = How(0, alternate, error_feedback, local_iterations, wire)
        self.kept = Kept(error_dtype, warm_start, refresh, alternate)
        self.scaler, self.link = scaler, Link() if fallback else None
        self.whole_dtype = fallback if isinstance(fallback, torch.dtype) else None
        self.step = 0
        self.memories: dict[str, Memory] = {}
        self.traffic = Traffic()
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self._names = WeakTensorKeyDictionary()
        self._at_once = False
        self._scale = 1.0

    def submit(self, bucket: GradBucket) -> Future[Tensor]:
        """Averages a bucket, in the worker; what a hook returns."""
        self.mean.start()
        buffer, step = bucket.buffer(), self.step
        compress = step >= self.start_step and (self.link is None or self.link.trying)
        if bucket.index() == 0 and self.scaler is not None:
            self._scale = float(self.scaler.get_scale())
        if bucket.is_last():
            self.step += 1
        if bucket.index() == 0:  # once a step: the worker may forget memories within it
            measuring = self.link is not None and self.link.compress is None
            self._at_once = not (compress or measuring or self.memories or self.mean.node is not None)
        if self._at_once:
            return self._whole(buffer)
        # DDP gives a sparse gradient a bucket of its own, which has no gradients() to take apart
        named = [] if buffer.is_sparse else list(zip(bucket.parameters(), bucket.gradients(), strict=True))
        gradients = [(self._name(parameter), gradient) for parameter, gradient in named]
        scale = self._scale
        last = bucket.is_last()

        def job() -> Tensor:
            if buffer.is_sparse:
                self._reduce_sparse(buffer)
            else:
                self._reduce(buffer, gradients, step, scale, compress=compress)
            if compress:
                self.ranks.settle(self.mean, buffer.device, last=last)
            if last and self.link is not None:
                self._measure(self.link, compress, buffer.device)
            return buffer

        return self.worker.submit(job, buffer.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Step, ranks, directions and errors: plain tensors by parameter's name, errors also by process.

        For ``torch.save``, ``safetensors`` (a file a process) and ``torch.distributed.checkpoint`` (all in one).

        Raises:
            LowRankError: without ``model``, or before ``init_process_group``.
        """
        self._named_model("state_dict")
        memories = self.memories
        if not memories:  # so that torch.distributed.checkpoint has tensors to load into
            made = {n: self._made(n, p) for n, p in self._parameters().items() if p.requires_grad}
            memories = {name: memory for name, memory in made.items() if memory is not None}
        compress = None if self.link is None else self.link.compress
        known = Known(self.step, self.ranks.chosen, self.ranks.spent, compress, memories)
        return saved(known, *place())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state of this process, or from one of :func:`merge_comm_states`.

        Raises:
            LowRankError: without ``model``, before ``init_process_group``, or for a state of another model, rank, or
                number of processes; then nothing is changed.
        """
        self._named_model("load_state_dict")
        known = load(state, self._parameters(), self.ranks.fixed, self.kept, *place())
        ruled = self.ranks.fixed is None and self.link is None and any(p.ndim > 1 for p in self._parameters().values())
        if ruled and known.step > self.start_step and not known.ranks:
            raise LowRankError(
                "load_state_dict: this state has no ranks, and a rule gave them. torch.distributed.checkpoint loads"
                " only what a fresh state_dict() has; load with torch.load or safetensors."
            )
        self.step, self.ranks.chosen, self.ranks.spent, compress, self.memories = known
        if self.link is not None:
            self.link.compress = compress

    def _parameters(self) -> dict[str, Tensor]:
        """What dense gradients there may be, by name."""
        return {} if self.model is None else dense_parameters(self.model)

    def _named_model(self, what: str) -> nn.Module:
        if self.model is None:
            raise LowRankError(
                f"{what}: this LowRankCommState has no names of parameters; give it model= to save or load it."
            )
        return self.model

    def stats(self) -> dict[str, Any]:
        """Bytes sent and saved, seconds of computing and of exchanging (waiting for others included).

        ``layers`` has by parameter: its rank, the bytes of a step and how many times fewer that is than fp32, the norm
        of what was not sent yet, the bytes that are remembered, and the seconds that its products took.
        """
        layers = {name: self._stats(memory) for name, memory in self.memories.items()}
        return {"steps": self.step, **self.traffic.summary(self.mean.clock.seconds), "layers": layers}

    def _stats(self, memory: Memory) -> dict[str, float]:
        stack, rows, columns = memory.shape
        sent = sum(bytes_on_wire(stack * memory.rank * side, self.how.wire) for side in (rows, columns))
        sent //= 2 if self.how.alternate else 1
        return {
            "rank": memory.rank,
            "bytes": sent,
            "ratio": 4 * stack * rows * columns / sent,
            "residual": float(torch.linalg.vector_norm(memory.error, dtype=torch.float64)),
            "bytes_kept": memory.nbytes(),
            "seconds": memory.clock.seconds,
        }

    def factors(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """``[rows, rank]`` and ``[columns, rank]``, whose product was the last low-rank gradient of a matrix.

        ``None`` for what is no matrix, and before.
        """
        memory = self.memories.get(self._names.get(parameter, ""))
        if memory is None or memory.paid is None or parameter.ndim != 2:
            return None
        left, right = memory.paid
        return left[0], right[0]

    def _whole(self, buffer: Tensor) -> Future[Tensor]:
        """The ordinary mean, as early as can be."""
        narrow = self._narrow(buffer.div_(self.mean.size))
        self.traffic.count(nbytes(narrow), nbytes(buffer), 0.0)
        work = dist.all_reduce(narrow, group=self.mean.group, async_op=True)
        future: Future[Tensor] = work.get_future().then(lambda done: _into(buffer, done.value()[0]))
        return future

    def _narrow(self, buffer: Tensor) -> Tensor:
        """As whole gradients go where compression loses; sparse ones always go as they are."""
        return buffer if buffer.is_sparse else buffer.to(self.whole_dtype or buffer.dtype)

    def _reduce_sparse(self, gradient: Tensor) -> None:
        """Averages a sparse gradient in place, as it is."""
        start, sent = time.perf_counter(), nbytes(gradient)
        self.mean.within_node_(gradient)
        self.mean.over_(gradient)
        self.traffic.count(sent, sent, time.perf_counter() - start)

    def _reduce(
        self, buffer: Tensor, named: list[tuple[str, Tensor]], step: int, scale: float, *, compress: bool
    ) -> None:
        start = time.perf_counter()
        self.mean.within_node_(buffer)
        sent = 0
        if compress and self.ranks.known(named):
            pieces = [Piece(gradient, self._memory(name, gradient, scale)) for name, gradient in named]
            sent = reduce_(buffer, pieces, self.mean, replace(self.how, step=step))
        else:
            owed = [] if compress else [(name, g) for name, g in named if name in self.memories]
            for name, gradient in owed:
                self.memories[name].rescale(scale)
                gradient.add_(gradient_of(self.memories[name].error, gradient.shape))
            narrow = buffer if compress else self._narrow(buffer)
            self.mean.over_(narrow)
            sent = narrow.nbytes
            _into(buffer, narrow)
            if compress:
                self.ranks.look(named)
            elif owed and bool(torch.isfinite(buffer).all()):
                for name, _ in owed:
                    del self.memories[name]
        self.traffic.count(sent, buffer.nbytes, time.perf_counter() - start)

    def _memory(self, name: str, gradient: Tensor, scale: float) -> Memory | None:
        """What is remembered of a gradient, if its factors are smaller than it is."""
        if name not in self.memories:
            made = self._made(name, gradient)
            if made is None:
                return None
            made.scale = scale
            self.memories[name] = made
        self.memories[name].rescale(scale)
        return self.memories[name]

    def _made(self, name: str, like: Tensor) -> Memory | None:
        shape = matrix_shape(like.shape)
        rank = None if shape is None else self.ranks.of(name, shape)
        return None if shape is None or rank is None else Memory(shape, rank, name, like.device, self.kept)

    def _measure(self, link: Link, compressed: bool, device: torch.device) -> None:
        link.stepped(compressed)
        if link.ready():
            times = link.times().to(device)
            self.mean.greatest_(times)
            link.decide(times)

    def _name(self, parameter: Tensor) -> str:
        if parameter not in self._names:
            if self.model is None:
                self._names[parameter] = f"parameter{len(self._names)}"
            else:
                self._names.update({p: name for name, p in self.model.named_parameters()})
        if parameter not in self._names:
            raise LowRankError(
                "low_rank_hook: a bucket has a parameter that model= has not; give the model of this wrapper."
            )
        name: str = self._names[parameter]
        return name


def _into(buffer: Tensor, averaged: Tensor) -> Tensor:
    if buffer.is_sparse:  # averaged in place; DDP copies it into the parameter's gradient, which it is already
        return buffer
    return averaged if averaged.data_ptr() == buffer.data_ptr() else buffer.copy_(averaged)
