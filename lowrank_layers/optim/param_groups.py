"""The parameter groups of a projection, and the groups of the wrapped optimizer that stand for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ..errors import LowRankError
from .projected_parameter import ProjectedParameter
from .torch_optimizers import decoupled


class Decay(NamedTuple):
    """How the weights of a projected parameter decay in one step.

    Args:
        to_gradient: factor on the weights that are added to the gradient.
        shrink: factor that the weights are multiplied by; ``None`` is 1.
    """

    to_gradient: float
    shrink: float | Tensor | None


class WrappedGroup:
    """One group of the projection as two groups of the wrapped optimizer: unprojected parameters, and small ones.

    Args:
        optimizer: the wrapped optimizer, to which the groups are added; a group without parameters is left out.
        group: the projection's group.
        projected: projected parameters by the original ones.
    """

    def __init__(
        self, optimizer: Optimizer, group: Mapping[str, Any], projected: Mapping[Tensor, ProjectedParameter]
    ) -> None:
        self._optimizer, self._projected = optimizer, projected
        self._params: list[Tensor] = list(group["params"])
        settings = _settings(group)
        self._plain = self._added([p for p in self._params if p not in projected], settings)
        self._small = self._added([projected[p].small for p in self._params if p in projected], settings)

    def sync(self, group: Mapping[str, Any], given: bool | None) -> dict[Tensor, Decay]:
        """Copies the settings of the projection's group to the wrapped optimizer.

        The wrapped optimizer does not decay the small parameters, since all of the weights decay.

        Args:
            group: the projection's group.
            given: whether weight decay is decoupled, where the user says so.

        Returns:
            How each projected parameter decays.
        """
        if list(map(id, self._params)) != list(map(id, group["params"])):
            raise LowRankError(
                "LowRankProjection: the parameters of a group were exchanged; make a new optimizer and projection"
                " for the new ones."
            )
        settings = _settings(group)
        if self._plain is not None:
            self._plain.update(settings)
        if self._small is None:
            return {}
        self._small.update(settings)
        if "weight_decay" in settings:
            self._small["weight_decay"] = 0.0
        decay = settings.get("weight_decay") or 0.0
        if decoupled(self._optimizer, group, given):
            each = Decay(0.0, 1 - settings["lr"] * decay if decay else None)
        else:
            # maximize negates the gradient, not the decay
            each = Decay(-decay if settings.get("maximize") else decay, None)
        return {p: each for p in self._params if p in self._projected}

    def reattach(self, groups: Iterator[dict[str, Any]]) -> None:
        """Takes its groups from those that ``load_state_dict`` of the wrapped optimizer has made anew, in order."""
        if self._plain is not None:
            self._plain = next(groups)
        if self._small is not None:
            self._small = next(groups)

    def _added(self, params: list[Tensor], settings: Mapping[str, Any]) -> dict[str, Any] | None:
        if not params:
            return None
        self._optimizer.add_param_group({"params": params, **settings})
        return self._optimizer.param_groups[-1]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
