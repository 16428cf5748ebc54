"""Running a model over batches, and the loss of its output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowRankError
from .fisher import describe_output, main_output, main_part
from .masks import broadcastable
from .padding import Padding

Loss = Callable[..., Tensor]
"""``loss(output, target) -> scalar``, or ``loss(output, target, mask=...)``."""


def check_batches(batches: object, owner: str) -> None:
    """Raises for one batch in the place of several."""
    if isinstance(batches, (Tensor, Mapping)):
        raise LowRankError(f"{owner}: got one {type(batches).__name__}, expected a list of batches; write [batch].")
    if not isinstance(batches, Iterable):
        raise LowRankError(f"{owner}: got {type(batches).__name__}, expected a list of batches.")


def batch_loss(batch: Any, loss: Loss, padding: Padding, owner: str) -> Tensor:
    """Runs a model on one batch; returns the loss, to which positions that are padding add nothing.

    Args:
        batch: inputs and target.
        loss: the loss.
        padding: the model, and what follows the masks of its forward pass.
        owner: the function that errors name.
    """
    output, target = forward_with_gradients(batch, padding)
    return output_loss(output, target, loss, padding, owner)


def forward_with_gradients(batch: Any, padding: Padding) -> tuple[Any, Any]:
    """Runs a model on one batch whose inputs require gradients; returns its output and the target.

    Args:
        batch: inputs and target.
        padding: the model, and what follows the masks of its forward pass.
    """
    padding.start(batch, target_of(batch))
    return forward(padding.model, _with_gradients(batch), with_target=True)


def output_loss(output: Any, target: Any, loss: Loss, padding: Padding, owner: str) -> Tensor:
    """Returns the loss of a model's output, to which positions that are padding add nothing.

    A loss that takes no mask and still looks at padding is taken for a mean over all positions: its gradients there are
    dropped, and the others are those of the mean over data.

    Args:
        output: what the model returned.
        target: the target of the batch.
        loss: the loss.
        padding: what has followed the masks of the forward pass.
        owner: the function that errors name.
    """
    main = main_output(output)
    real = padding.of_output(main)
    if main is not None and real is not None and main.requires_grad and not _takes_mask(loss):
        found = broadcastable(real, tuple(main.shape))
        if found is not None:
            shown = main.view_as(main)  # later hooks of one tensor run later
            shown.register_hook(_of_data(found))
            output = with_main(output, shown)
    try:
        value = call_loss(loss, output, target, real)
    except (TypeError, AttributeError, KeyError) as error:
        if isinstance(output, Tensor) or isinstance(error, LowRankError):
            raise
        raise LowRankError(
            f"{owner}: the loss failed ({type(error).__name__}: {error}). The model returned {describe_output(output)};"
            " choose the part that the loss is about: loss = lambda output, target:"
            f" your_loss(output{main_part(output)}, target)."
        ) from error
    return check_loss(value, owner, output)


def check_loss(value: object, owner: str, output: object = None) -> Tensor:
    """Returns the loss; raises if it is no scalar with a gradient."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        came = "" if output is None else f" The model returned {describe_output(output)}."
        raise LowRankError(
            f"{owner}: the loss returned {got}, expected a scalar tensor that depends on the model's output.{came}"
        )
    return value


def target_of(batch: Any) -> Any:
    """Returns the target of a batch: the labels of a dict, or the last item of a tuple."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def forward(model: nn.Module, batch: Any, *, with_target: bool) -> tuple[Any, Any]:
    """Runs a model on one batch; returns its output and the target."""
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    target = None
    if isinstance(batch, Mapping):
        kwargs, target = batch, batch.get("labels")
    elif isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, (tuple, list)) and batch:
        args = batch
        if with_target and len(batch) > 1:
            args, target = batch[:-1], batch[-1]
    else:
        raise LowRankError(
            f"got a batch of type {type(batch).__name__}, expected a tensor, a tuple (inputs..., target)"
            " or a dict of keyword arguments."
        )
    try:
        return model(*args, **kwargs), target
    except TypeError as error:
        _check_signature(model, args, kwargs, error, with_target=with_target)
        raise


def _check_signature(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], error: TypeError, *, with_target: bool
) -> None:
    """Raises if it was the batch that did not fit the model's signature."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as mismatch:
        got = f"{len(args)} inputs" if args else f"the keyword arguments {', '.join(map(str, kwargs))}"
        hint = (
            ""
            if with_target or len(args) < 2
            else (" Without a loss every item of a tuple is an input: leave the target out, or calibrate with a loss.")
        )
        raise LowRankError(
            f"got a batch of {got}, which {type(model).__name__}.forward does not take ({mismatch}).{hint}"
        ) from error


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode inside, and gives every module its own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Lets no parameter require gradients inside; afterwards those that did do so again."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the one tensor that a layer was called with."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def _with_gradients(batch: Any) -> Any:
    """The batch with floating point inputs that require gradients, which reentrant checkpoints need.

    They are copies, and no leaves, so that a model may change them in place.
    """
    if isinstance(batch, Tensor):
        return _copy(batch)
    if isinstance(batch, Mapping):
        return {name: value if "mask" in name or name == "labels" else _copy(value) for name, value in batch.items()}
    return type(batch)(map(_copy, batch)) if type(batch) in (tuple, list) else batch


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_().clone()


def _takes_mask(loss: Loss) -> bool:
    try:
        return "mask" in inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return False


def call_loss(loss: Loss, output: Any, target: Any, mask: Tensor | None) -> Any:
    """Calls a loss or metric, with the mask of the output where it takes one."""
    return loss(output, target, mask=mask) if _takes_mask(loss) else loss(output, target)


def with_main(output: Any, main: Tensor) -> Any:
    """Returns the output with another tensor in the place of :func:`main_output`; itself where it cannot be rebuilt.

    Args:
        output: what a model returned.
        main: the other tensor.
    """
    old = main_output(output)
    if output is old:
        return main
    if is_dataclass(output) and not isinstance(output, type):
        name = next((field.name for field in fields(output) if getattr(output, field.name) is old), None)
        return output if name is None else replace(output, **{name: main})
    if type(output) in (tuple, list):
        return type(output)(main if value is old else value for value in output)
    if type(output) is dict:
        return {name: main if value is old else value for name, value in output.items()}
    return output


def _of_data(real: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        counted = (gradient.masked_fill(real, 0) != 0).any()
        share = torch.where(counted, real.numel() / real.sum().clamp(min=1), 1.0)
        return gradient.masked_fill(~real, 0) * share.to(gradient.dtype)

    return hook
