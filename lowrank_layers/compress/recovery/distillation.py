"""Distillation: how far a model's output and hidden states are from those of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...calibrate import Padding, counted_positions, describe_output, main_output, mask_of_rows, quiet_eval
from ...errors import LowRankError
from ...settings import settings_from
from ...trainer_callbacks import hf_callback, lightning_callback
from .settings import RecoverySettings


class Distillation:
    """The distance of a model from its teacher, for those who train the model themselves.

    Inside the ``with`` block every forward pass of the model runs the teacher on the same inputs, in eval mode and
    without gradients; the object is then called with the model's output and returns a scalar to minimize. It is a term
    of the loss in Lightning's ``training_step``, and in the ``compute_loss_func`` of transformers' Trainer, where a
    callback takes the place of the ``with`` block. :func:`recover_` uses it itself.

    Positions that are padding, by the masks that modules are called with or by labels of -100, count nowhere.

    Args:
        model: the compressed model; :class:`torch.nn.parallel.DistributedDataParallel` may wrap it.
        teacher: the model to imitate, on the same device. It takes the same inputs.
        settings: :class:`RecoverySettings`, of which those of distillation are used.
        **changes: fields of :class:`RecoverySettings` by name.

    Raises:
        LowRankError: for a teacher that shares trained parameters with the model, and for hidden states that a model
            has not.

    Examples:
        >>> import copy
        >>> dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> small = lr.factorize_(copy.deepcopy(dense), lr.make_plan(dense, rank=2))
        >>> x = torch.randn(32, 8)
        >>> with lr.Distillation(small, dense, temperature=2.0, hidden=["0"]) as distillation:
        ...     distillation(small(x)).backward()
        >>> small[0].down.weight.grad.shape
        torch.Size([2, 8])

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, settings: RecoverySettings | None = None, **changes: Any
    ) -> None:
        self.settings = settings_from(RecoverySettings, settings, changes, "Distillation")
        self.model = unwrapped(model)
        self.teacher = _check_teacher(self.model, teacher, self.settings)
        self.padding = Padding(self.model)
        self._output: Any = None
        self._hidden: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._undo = ExitStack()

    def __enter__(self) -> Distillation:
        with ExitStack() as undo:
            undo.enter_context(quiet_eval(self.teacher))
            undo.enter_context(self.padding)
            undo.callback(self.model.register_forward_pre_hook(self._run_teacher, with_kwargs=True).remove)
            for module, found in zip((self.model, self.teacher), self._hidden, strict=True):
                for name in self.settings.hidden:
                    undo.callback(module.get_submodule(name).register_forward_hook(_record(name, found)).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()
        self._output = None
        for found in self._hidden:
            found.clear()

    def to_hf_callback(self) -> Any:
        """Returns a callback for the ``Trainer`` of transformers, in the place of a ``with`` block.

        The distance is given to the trainer as its loss or a term of it, for instance
        ``Trainer(compute_loss_func=lambda output, labels, num_items_in_batch=None: distillation(output, labels))``. The
        trainer itself keeps the best state (``load_best_model_at_end``), resumes, and accumulates gradients.

        Raises:
            MissingExtraError: if transformers is not installed.
        """
        return hf_callback(self._begin, self._end)

    def to_lightning_callback(self) -> Any:
        """Returns a callback for Lightning's ``Trainer``, in the place of a ``with`` block.

        The term of the loss is added in ``training_step``.

        Raises:
            MissingExtraError: if Lightning is not installed.
        """
        return lightning_callback(self._begin, self._end)

    def _begin(self, _: int) -> None:
        self._end()
        self.__enter__()

    def _end(self) -> None:
        self.__exit__()

    def __call__(self, output: Any, target: Any = None, mask: Tensor | None = None) -> Tensor:
        """Returns the weighted distance of the last forward pass.

        Args:
            output: what the model returned.
            target: its target, of which only labels of -100 are looked at.
            mask: mask of the output, nonzero at data; ``None`` takes that of the model's own masks.
        """
        ours, theirs = main_output(output), main_output(self._output)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise LowRankError(
                f"Distillation: the model returned {describe_output(output)} and the teacher"
                f" {describe_output(self._output)}, expected outputs of one shape; call the model inside the with"
                " block."
            )
        settings = self.settings
        mask = self.padding.of_output(ours) if mask is None else mask
        ours, theirs = ours.movedim(settings.class_dim, -1), theirs.movedim(settings.class_dim, -1)
        chosen = counted_positions(tuple(ours.shape[:-1]), target, mask)
        if chosen is not None:
            ours, theirs = ours[chosen.to(ours.device)], theirs[chosen.to(theirs.device)]
        distance = (
            divergence(ours, theirs, settings.temperature)
            if settings.distance == "kl"
            else F.mse_loss(single(ours), single(theirs))
        )
        total = settings.distillation_weight * distance
        for name in settings.hidden:
            total = total + settings.hidden_weight / len(settings.hidden) * self._hidden_distance(name, mask)
        return total

    def _hidden_distance(self, name: str, mask: Tensor | None) -> Tensor:
        found = [hidden.get(name) for hidden in self._hidden]
        ours, theirs = found
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in found]
            raise LowRankError(
                f"Distillation: hidden={name!r} has the outputs {shapes[0]} and {shapes[1]} in the model and its"
                " teacher, expected one tensor of the same shape; choose another module."
            )
        rows = None if mask is None else mask_of_rows(mask != 0, tuple(ours.shape[:-1]))
        if rows is not None:
            ours, theirs = ours[rows[0].to(ours.device)], theirs[rows[0].to(theirs.device)]
        ours, theirs = single(ours), single(theirs)
        return (ours - theirs).square().sum() / theirs.square().sum().clamp_min(1e-12)

    @torch.no_grad()
    def _run_teacher(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for found in self._hidden:
            found.clear()
        self._output = self.teacher(*args, **kwargs)


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Returns the mean divergence :math:`T^2 \, KL(softmax(t / T) \| softmax(s / T))` of the rows.

    A class whose logit is minus infinity in the teacher, such as an action that is not allowed, adds nothing to it.

    Args:
        logits: those of the model, ``[..., classes]``.
        teacher: those of the teacher.
        temperature: the temperature :math:`T`. The square keeps the size of the gradients.
    """
    ours = (single(logits) / temperature).log_softmax(-1).flatten(0, -2)
    theirs = (single(teacher) / temperature).log_softmax(-1).flatten(0, -2)
    impossible = theirs.isneginf()
    if impossible.any():
        ours, theirs = ours.masked_fill(impossible, 0.0), theirs.masked_fill(impossible, 0.0)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def single(tensor: Tensor) -> Tensor:
    """Returns the tensor in single precision, if it has less."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside DistributedDataParallel and ``torch.compile``."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def _record(name: str, found: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = next(iter(output.values()), None) if isinstance(output, Mapping) else output
        first = first[0] if isinstance(first, (tuple, list)) and first else first
        if isinstance(first, Tensor):
            found[name] = first

    return hook


def _check_teacher(model: nn.Module, teacher: object, settings: RecoverySettings) -> nn.Module:
    """Returns the teacher; raises if it cannot teach this model."""
    if not isinstance(teacher, nn.Module):
        raise LowRankError(f"Distillation: got teacher of type {type(teacher).__name__}, expected a torch.nn.Module.")
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    shared = [own[id(p)] for p in teacher.parameters() if id(p) in own]
    if shared:
        raise LowRankError(
            f"Distillation: the teacher shares {shared[0]!r} with the model and would change with it; take a copy"
            " before factorizing, as in dense = copy.deepcopy(model)."
        )
    ours, theirs = ({p.device for p in each.parameters()} for each in (model, teacher))
    if ours and theirs and not ours & theirs:
        raise LowRankError(f"Distillation: the teacher is on {min(map(str, theirs))}, expected {min(map(str, ours))}.")
    for who, each in (("model", model), ("teacher", teacher)):
        names = {name for name, _ in each.named_modules()}
        for name in settings.hidden:
            if name not in names:
                raise LowRankError(
                    f"Distillation: got hidden={name!r}, but the {who} has no such module; names are those of"
                    " named_modules()."
                )
    return teacher
