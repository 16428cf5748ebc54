"""Any optimizer on projected gradients: its state is as small as the projection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..errors import LowRankError
from ..rank import Rank, check_rank
from .basis import ProjectionMethod
from .optimizer_traits import decoupled, reads_values
from .settings import check_optimizer, check_settings, chooser
from .shadow import FactorSource, Shadow

_OWN = ("projector", "projector_age", "projector_fits")


class LowRankProjection(Optimizer):
    r"""Puts a projection of the gradients before any optimizer, whose state is then as small as the projection.

    Of a matrix ``[n, m]`` with gradient :math:`G` the optimizer is shown :math:`P^T G` (or :math:`G P`, on the shorter
    side), with :math:`P` orthonormal of ``rank`` columns, and its step :math:`\Delta` is taken back: :math:`W` gains
    ``scale`` :math:`\cdot P \Delta`. Convolutions count as ``[out, rest]``. Parameters of one dimension, those whose
    shorter side is not above ``rank`` (under a rule: 1), and what is not in ``target`` are stepped as ever.

    The optimizer is taken over: its groups hold small parameters from now on. Use the projection in its place, for
    schedulers, ``GradScaler``, ``zero_grad`` and checkpoints too; set ``lr`` and the rest in *its* ``param_groups``.
    Weight decay acts on the whole weights. All processes of a ``DistributedDataParallel`` have the same gradients and
    so the same projectors, without communication.

    Args:
        optimizer: new, of torch or made like them: AdamW, Adam, SGD, RMSprop, Adafactor...
        rank: of the projections: an integer, or a rule that looks at the singular values of each parameter's first
            gradient that is finite and not zero; until then the parameter only decays. The rank stays.
            ``ParameterFraction`` counts the numbers of projector and coefficients.
        refresh: steps from one projector to the next.
        method: ``"svd"`` fits to the gradient exactly; ``"power"`` starts from the last projector and makes two steps
            of subspace iteration, so that ``refresh`` may be small; ``"random"`` draws.
        scale: of the projected steps, beside the learning rate.
        target: the parameters to project, or a function that says so; ``None`` for all that are big enough.
        min_size: entries that a parameter needs at least.
        rotate: which moments are taken along into the new basis: ``"first"``, ``"both"``, the squares as if
            coefficients did not correlate, which makes longer steps in new directions, or ``"none"``, as GaLore.
        seed: of what is drawn; the same in all processes.
        decoupled: whether weight decay acts beside the step, as in AdamW; ``None`` where the optimizer is torch's own.
        comm_state: of the hook that averages the gradients: its factors give the projectors of matrices, and nothing is
            decomposed; where its rank is lower, directions of before stay beside them. A copy has none.

    Raises:
        LowRankError: for an optimizer that has begun already or cannot be used, and for other wrong arguments; nothing
            changes then.

    Note:
        GaLore as published is ``rotate="none", scale=0.25``. ``method="power"`` with a ``refresh`` of 10 or 20 costs
        about as much as ``"svd"`` every 50 steps, and follows the gradients more closely.

        SGD's step is the projection of its plain step. Adam's differs at any rank, as it scales entry by entry, in
        the basis that it is shown.

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
        self._chosen = chooser(target)
        groups = optimizer.param_groups
        for group in groups:
            self._check_group(group)
        self._shadows: dict[Tensor, Shadow] = {}
        self._inner: list[tuple[list[Tensor], dict[str, Any] | None, dict[str, Any] | None]] = []
        optimizer.param_groups = []
        super().__init__([dict(group) for group in groups], optimizer.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, projected by the same rules.

        Args:
            param_group: as for every torch optimizer.

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
        plain: list[Tensor] = []
        small: list[Tensor] = []
        for p in group["params"]:
            if self._projects(p):
                shadow = Shadow(p, self.rank, self.seed + 1_000_003 * len(self._shadows))
                self._shadows[p] = shadow
                small.append(shadow.small)
            else:
                plain.append(p)
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        self._inner.append((list(group["params"]), self._join(plain, settings), self._join(small, settings)))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the optimizer, projected.

        A gradient that is not finite refits no projector; the optimizer sees it, as it would without a projection.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            LowRankError: for a sparse gradient of a projected parameter, or parameters exchanged in the groups.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shrinks = self._settle()
        values = reads_values(self.optimizer)
        going = []
        for p, shadow in self._shadows.items():
            if p.grad is None:
                continue
            decay, shrink = shrinks[p]
            gradient = shadow.gradient(decay)
            if not shadow.knows_rank(gradient):
                shadow.shrunk(shrink)
                continue
            going.append((shadow, shrink))
            if shadow.due(self.refresh):
                factors = None if self.comm_state is None or decay else self.comm_state.factors(shadow.parameter)
                turn = shadow.refit(gradient, self.method, factors)
                if turn is not None and self.rotate != "none":
                    shadow.rotate(self.optimizer.state[shadow.small], turn, self.rotate == "both")
            shadow.project(gradient, values)
        self.optimizer.step()
        for shadow, shrink in going:
            shadow.apply(shrink, self.scale)
        return loss

    def projected(self) -> list[tuple[Tensor, Tensor]]:
        """The projected parameters, each with the small one that is the key of its state in ``optimizer.state``."""
        return [(p, shadow.small) for p, shadow in self._shadows.items()]

    def state_bytes(self) -> int:
        """The bytes of the optimizer's state and the projectors."""
        tensors = [t for state in self._merged().values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors)

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's: ``state`` by the parameter's index, with the projectors, and ``param_groups``."""
        self.state = defaultdict(dict, self._merged())
        try:
            return super().state_dict()
        finally:
            self.state = defaultdict(dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state, to the bit.

        Args:
            state_dict: what :meth:`state_dict` returned, for the same parameters, rank and optimizer.

        Raises:
            LowRankError: if it belongs to something else; nothing changes then.
        """
        lengths = [
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        ]
        if lengths[0] != lengths[1]:
            raise LowRankError(
                f"load_state_dict: got groups of {lengths[0]} parameters, expected {lengths[1]}; build the optimizer as"
                " the saved one was."
            )
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        found = {p: dict(state_dict["state"].get(key, {})) for key, p in zip(keys, self._parameters(), strict=True)}
        for p, state in found.items():
            shadow = self._shadows.get(p)
            got = tuple(state["projector"].shape) if "projector" in state else None
            wanted = None if shadow is None or not state else shadow.projector_shape(got)
            if got != wanted:
                raise LowRankError(
                    f"load_state_dict: got {_described(got)} for a parameter {list(p.shape)}, expected"
                    f" {_described(wanted)}; give the rank, target and min_size of the saved run."
                )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = defaultdict(dict)
        for p, shadow in self._shadows.items():
            shadow.load(found[p])
        self._load_inner(found)

    def __getstate__(self) -> dict[str, Any]:
        # a process group cannot be copied
        return {**self.__dict__, **super().__getstate__(), "comm_state": None}

    def _load_inner(self, found: dict[Tensor, dict[str, Any]]) -> None:
        self._settle()
        state = self.optimizer.state_dict()
        by_key = {
            self._shadows[p].small if p in self._shadows else p: {k: v for k, v in own.items() if k not in _OWN}
            for p, own in found.items()
            if own
        }
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        state["state"] = {index: by_key[p] for index, p in enumerate(order) if p in by_key}
        self.optimizer.load_state_dict(state)
        # torch has put new dicts into its list of groups
        fresh = iter(self.optimizer.param_groups)
        self._inner = [
            (params, next(fresh) if plain else None, next(fresh) if small else None)
            for params, plain, small in self._inner
        ]

    def _settle(self) -> dict[Tensor, tuple[float, Any]]:
        """Copies the groups' settings to the optimizer; says how the weights of each projected parameter decay."""
        shrinks: dict[Tensor, tuple[float, Any]] = {}
        for group, (params, plain, small) in zip(self.param_groups, self._inner, strict=True):
            if list(map(id, params)) != list(map(id, group["params"])):
                raise LowRankError(
                    "LowRankProjection: the parameters of a group were exchanged; make a new optimizer and projection"
                    " for the new ones."
                )
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            if plain is not None:
                plain.update(settings)
            if small is None:
                continue
            small.update(settings)
            decay = settings.get("weight_decay") or 0.0
            beside = decoupled(self.optimizer, group, self.decoupled)
            if "weight_decay" in settings:
                small["weight_decay"] = 0.0
            # the optimizer turns the gradient round, not what decay adds to it
            pull = 0.0 if beside else -decay if settings.get("maximize") else decay
            shrink = 1 - settings["lr"] * decay if beside and decay else None
            for p in params:
                if p in self._shadows:
                    self._shadows[p].check()
                    shrinks[p] = pull, shrink
        return shrinks

    def _join(self, params: list[Tensor], settings: dict[str, Any]) -> dict[str, Any] | None:
        if not params:
            return None
        self.optimizer.add_param_group({"params": params, **settings})
        return self.optimizer.param_groups[-1]

    def _merged(self) -> dict[Tensor, dict[str, Any]]:
        merged: dict[Tensor, dict[str, Any]] = {}
        for p in self._parameters():
            shadow = self._shadows.get(p)
            state = self.optimizer.state.get(p if shadow is None else shadow.small)
            if state or (shadow is not None and shadow.basis is not None):
                merged[p] = {**(state or {}), **({} if shadow is None else shadow.state())}
        return merged

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _projects(self, p: Tensor) -> bool:
        return (
            p.ndim >= 2
            and p.is_floating_point()
            and p.numel() >= max(self.min_size, 1)
            and min(p.shape[0], p.numel() // p.shape[0]) > (self.rank if isinstance(self.rank, int) else 1)
            and self._chosen(p)
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


def _described(shape: tuple[int, ...] | None) -> str:
    return "no projector" if shape is None else f"a projector {list(shape)}"
