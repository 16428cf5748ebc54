"""GaLore: any optimizer on projected gradients, with a state as small as the projection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..errors import LowRankError
from ..rank import Rank, check_rank
from .param_groups import Decay, WrappedGroup
from .projected_parameter import FactorSource, ProjectedParameter
from .projectors import ProjectionMethod
from .settings import check_optimizer, check_settings, target_filter
from .state_dict import checked_states, load_wrapped, merged_states
from .torch_optimizers import decoupled, reads_values


class LowRankProjection(Optimizer):
    r"""Wraps an optimizer so that it sees projected gradients; its state is then as small as they are (GaLore).

    For a matrix ``[n, m]`` with gradient :math:`G` the optimizer sees :math:`P^T G` (or :math:`G P`, on the shorter
    side) with an orthonormal :math:`P` of ``rank`` columns, and its step :math:`\Delta` is projected back: :math:`W`
    gains ``scale`` :math:`\cdot P \Delta`. Convolutions are matrices ``[out, rest]``. Parameters of one dimension,
    those whose shorter side is at most ``rank`` (under a rule: 1), and those not in ``target`` are not projected.

    The wrapped optimizer's groups hold small parameters from now on. Use the projection in its place, for
    schedulers, ``GradScaler``, ``zero_grad`` and checkpoints too; set ``lr`` and other settings in *its*
    ``param_groups``. Weight decay acts on all of the weights. All processes of a ``DistributedDataParallel`` have the
    same gradients and so the same projectors, without communication.

    Args:
        optimizer: a new optimizer, one of torch's or made like them: AdamW, Adam, SGD, RMSprop, Adafactor...
        rank: rank of the projectors: an integer, or a rule that looks at the singular values of each parameter's first
            gradient that is finite and not zero; until then the parameter only decays. The rank then stays.
            ``ParameterFraction`` counts the elements of projector and projected gradient.
        refresh: number of steps from one projector to the next.
        method: ``"svd"`` fits the projector to the gradient exactly; ``"power"`` makes two steps of subspace iteration
            from the last projector, so that ``refresh`` can be small; ``"random"`` draws it.
        scale: factor on the projected steps, beside the learning rate.
        target: the parameters to project, or a function that says whether a parameter is; ``None`` projects all that
            are big enough.
        min_size: number of elements that a projected parameter has at least.
        rotate: the moments that are rotated into the basis of a new projector: ``"first"``; ``"both"``, second moments
            as if coefficients were uncorrelated, which makes longer steps in new directions; or ``"none"``, as GaLore.
        seed: seed of what is random; the same in all processes.
        decoupled: whether weight decay is decoupled, as in AdamW; ``None`` where the optimizer is one of torch's.
        comm_state: the state of the hook that averages the gradients (:class:`LowRankCommState`). Its factors give the
            projectors of matrices, and nothing is decomposed; where its rank is lower, directions of the last
            projector fill up. A copy of the projection has none.

    Raises:
        LowRankError: for an optimizer that has a state already or is not supported, and for other wrong arguments;
            nothing changes then.

    Note:
        GaLore as published is ``rotate="none", scale=0.25``. ``method="power"`` with a ``refresh`` of 10 or 20 costs
        about as much as ``"svd"`` every 50 steps, and follows the gradients more closely.

        The step of SGD is the projection of its unprojected step. That of Adam differs at any rank, since Adam scales
        each entry by itself, in the basis that it sees.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> optimizer = lr.LowRankProjection(torch.optim.AdamW(model.parameters(), lr=1e-3), rank=4, refresh=50)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(32, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.optimizer.state[optimizer.projected()[0][1]]["exp_avg"].shape
        torch.Size([128, 4])

    Reference:
        Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, ICML 2024.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rank: Rank,
        *,
        refresh: int = 200,
        method: ProjectionMethod = "svd",
        scale: float = 1.0,
        target: Iterable[Tensor] | Callable[[Tensor], bool] | None = None,
        min_size: int = 0,
        rotate: Literal["none", "first", "both"] = "first",
        seed: int = 0,
        decoupled: bool | None = None,
        comm_state: FactorSource | None = None,
    ) -> None:
        if isinstance(optimizer, LowRankProjection):
            raise LowRankError(
                "LowRankProjection: got a LowRankProjection, expected the optimizer inside; project once."
            )
        check_optimizer(optimizer)
        if comm_state is not None and not isinstance(comm_state, FactorSource):
            raise LowRankError(
                f"LowRankProjection: got comm_state {type(comm_state).__name__}, expected the LowRankCommState of the"
                " hook, or None."
            )
        check_rank(rank, "LowRankProjection")
        check_settings(
            refresh=refresh,
            method=method,
            scale=scale,
            min_size=min_size,
            rotate=rotate,
            seed=seed,
            decoupled=decoupled,
        )
        self.optimizer = optimizer
        self.rank, self.refresh, self.method, self.scale = rank, refresh, method, scale
        self.min_size, self.rotate, self.seed, self.decoupled = min_size, rotate, seed, decoupled
        self.comm_state = comm_state
        self._targets = target_filter(target)
        groups = optimizer.param_groups
        for group in groups:
            self._check_group(group)
        self._projected: dict[Tensor, ProjectedParameter] = {}
        self._wrapped: list[WrappedGroup] = []
        optimizer.param_groups = []
        super().__init__([dict(group) for group in groups], optimizer.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, projected by the same rules.

        Args:
            param_group: a group as for every torch optimizer.

        Raises:
            LowRankError: for parameters that cannot be projected.
        """
        count = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except LowRankError:
            del self.param_groups[count:]
            raise
        for p in group["params"]:
            if self._projects(p):
                seed = self.seed + 1_000_003 * len(self._projected)
                self._projected[p] = ProjectedParameter(p, self.rank, seed)
        self._wrapped.append(WrappedGroup(self.optimizer, group, self._projected))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a step.

        A gradient that is not finite does not change the projector; the optimizer sees it as it would unprojected.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            LowRankError: for a sparse gradient of a projected parameter, or parameters exchanged in the groups.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = self._sync_groups()
        values = reads_values(self.optimizer)
        stepping = []
        for p, projected in self._projected.items():
            if p.grad is None:
                continue
            decay = decays[p]
            gradient = projected.gradient(decay.to_gradient)
            if not projected.knows_rank(gradient):
                projected.shrink_(decay.shrink)
                continue
            stepping.append((projected, decay))
            if projected.due(self.refresh):
                factors = None if self.comm_state is None or decay.to_gradient else self.comm_state.factors(p)
                rotation = projected.refit(gradient, self.method, factors)
                if rotation is not None and self.rotate != "none":
                    state = self.optimizer.state[projected.small]
                    projected.rotate_moments(state, rotation, second=self.rotate == "both")
            projected.project(gradient, values)
        self.optimizer.step()
        for projected, decay in stepping:
            projected.apply_step(decay.shrink, self.scale)
        return loss

    def projected(self) -> list[tuple[Tensor, Tensor]]:
        """The projected parameters, each with the small one that is the key of its state in ``optimizer.state``."""
        return [(p, projected.small) for p, projected in self._projected.items()]

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state and the projectors."""
        tensors = [t for state in self._merged().values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """A state dict as of every torch optimizer; each parameter's ``state`` also holds its projector."""
        self.state = defaultdict(dict, self._merged())
        try:
            return super().state_dict()
        finally:
            self.state = defaultdict(dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from a state dict; the run then goes on to the bit.

        Args:
            state_dict: what :meth:`state_dict` returned, for the same parameters, rank and optimizer.

        Raises:
            LowRankError: if it belongs to other parameters, ranks or targets; nothing changes then.
        """
        states = checked_states(state_dict, self.param_groups, self._projected)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = defaultdict(dict)
        for p, projected in self._projected.items():
            projected.load(states[p])
        self._sync_groups()
        load_wrapped(self.optimizer, states, self._projected)
        groups = iter(self.optimizer.param_groups)
        for wrapped in self._wrapped:
            wrapped.reattach(groups)

    def __getstate__(self) -> dict[str, Any]:
        # a process group cannot be copied
        return {**self.__dict__, **super().__getstate__(), "comm_state": None}

    def _sync_groups(self) -> dict[Tensor, Decay]:
        """Copies the groups' settings to the wrapped optimizer; returns how each projected parameter decays."""
        decays: dict[Tensor, Decay] = {}
        for group, wrapped in zip(self.param_groups, self._wrapped, strict=True):
            decays |= wrapped.sync(group, self.decoupled)
        for projected in self._projected.values():
            projected.check_gradient()
        return decays

    def _merged(self) -> dict[Tensor, dict[str, Any]]:
        parameters = (p for group in self.param_groups for p in group["params"])
        return merged_states(self.optimizer, parameters, self._projected)

    def _projects(self, p: Tensor) -> bool:
        return (
            p.ndim >= 2
            and p.is_floating_point()
            and p.numel() >= max(self.min_size, 1)
            and min(p.shape[0], p.numel() // p.shape[0]) > (self.rank if isinstance(self.rank, int) else 1)
            and self._targets(p)
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if is_lazy(p):
                raise LowRankError(
                    "LowRankProjection: got a lazy parameter without a shape; run the model once before."
                )
            if type(p).__name__ == "DTensor" and self._projects(p):
                raise LowRankError(
                    "LowRankProjection: got a sharded parameter, and no process sees its whole gradient; train with"
                    " DistributedDataParallel instead of fully_shard, or leave it out of target."
                )
        decoupled(self.optimizer, group, self.decoupled)
