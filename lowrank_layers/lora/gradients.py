"""The full gradients of a model's weights, from which LoRA-GA starts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Loss, MaskOf, Padding, batch_loss, check_batches, check_mask, fitting_scale, frozen, quiet_eval
from ..errors import LowRankError
from ..modules import check_model, is_quantized
from .target import Target, targets


def weight_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    target: Target | None = None,
    mask: MaskOf | None = None,
) -> dict[str, Tensor]:
    """Returns the gradient of the loss with respect to every weight, averaged over batches, for :class:`LoRAGA`.

    Runs the model in eval mode on its own device; the train / eval flags, ``requires_grad`` and ``.grad`` are left as
    they were. Of an adapted model the gradients are those at the weights with their adapters.

    Args:
        model: any model; frozen weights have gradients here too, quantized and factored ones have none.
        batches: tensors, tuples ``(inputs..., target)``, or dicts of keyword arguments (their ``"labels"`` are the
            target), as in :func:`calibrate`.
        loss: ``loss(output, target) -> scalar``.
        target: which weights, as in :func:`add_lora_`; by default every matrix and kernel. Their gradients take four
            bytes per parameter.
        mask: how the padding of a batch is found, as in :func:`calibrate`; masks that the model is called with are
            followed without it.

    Returns:
        Gradients in fp32 by the names of ``named_parameters``; a tied weight has one under each of its names. Weights
        that the loss does not depend on are left out.

    Raises:
        LowRankError: for no batches, batches of another kind, a loss that is no scalar, or gradients that are not
            finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> batches = [(torch.randn(32, 8), torch.randint(4, (32,))) for _ in range(2)]
        >>> gradients = lr.weight_gradients(model, batches, nn.functional.cross_entropy)
        >>> {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        {'0.weight': (16, 8), '2.weight': (4, 16)}

    Reference:
        Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, NeurIPS 2024, section 3.
    """
    check_model(model, quantized=True)
    check_batches(batches, "weight_gradients")
    check_mask(mask, "weight_gradients")
    weights = _weights(model, target)
    trainable = [weight.requires_grad for weight in weights]
    before = [(weight.grad, weight._post_accumulate_grad_hooks) for weight in weights]
    sums: list[Tensor | None] = [None] * len(weights)
    count = 0
    try:
        with quiet_eval(model), frozen(model), torch.enable_grad(), Padding(model, mask) as padding:
            for weight in weights:
                if weight._post_accumulate_grad_hooks:
                    weight._post_accumulate_grad_hooks = {}  # an optimizer's step, perhaps
                weight.requires_grad_(True)
            for batch in batches:
                count += 1
                value = batch_loss(batch, loss, padding, "weight_gradients")
                found = _backward(value, weights)
                sums = [_plus(total, gradient) for total, gradient in zip(sums, found, strict=True)]
    finally:
        for weight, flag, (gradient, hooks) in zip(weights, trainable, before, strict=True):
            weight.requires_grad_(flag)
            weight.grad = gradient
            if hooks:
                weight._post_accumulate_grad_hooks = hooks
    if not count:
        raise LowRankError("weight_gradients: batches is empty.")
    means = {id(weight): total / count for weight, total in zip(weights, sums, strict=True) if total is not None}
    names = _names(model)
    for key, mean in means.items():
        if not bool(torch.isfinite(mean).all()):
            raise LowRankError(
                f"weight_gradients: the gradient of {names[key][0]!r} has NaN or Inf; look at the batches."
            )
    return {name: means[key] for key, own in names.items() if key in means for name in own}


def _weights(model: nn.Module, target: Target | None) -> list[nn.Parameter]:
    """The parameters that hold the weights of a target, each once."""
    found: dict[int, nn.Parameter] = {}
    for each in targets(model, (lambda *_: True) if target is None else target):
        weight = each.holder
        if weight is not None and weight.is_floating_point() and not is_quantized(weight):
            found[id(weight)] = weight
    if not found:
        raise LowRankError("weight_gradients: no weight of the target is a dense floating point parameter.")
    return list(found.values())


def _backward(loss: Tensor, weights: list[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of a loss in fp32; in fp16 the loss is scaled so that they neither vanish nor overflow.

    Runs ``backward`` in place of ``torch.autograd.grad``, which reentrant checkpoints refuse.
    """

    def run(scale: float, *, again: bool) -> list[Tensor | None]:
        for weight in weights:
            weight.grad = None
        torch.autograd.backward(loss, torch.full_like(loss, scale), retain_graph=again)
        return [weight.grad for weight in weights]

    def largest(scale: float) -> float:
        return max((float(_wide(g).abs().max()) for g in run(scale, again=True) if g is not None), default=0.0)

    device = loss.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    half = autocast or any(weight.dtype == torch.float16 for weight in weights)
    scale = fitting_scale(largest, loss.dtype) if half else 1.0
    return [None if gradient is None else _wide(gradient) / scale for gradient in run(scale, again=False)]


def _wide(gradient: Tensor) -> Tensor:
    """A dense gradient in fp32."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).float()


def _plus(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The sum, in place; what is ``None`` counts as zero."""
    if gradient is None:
        return total
    return gradient if total is None else total.add_(gradient)


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its identity."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names
