"""The error of a stage's output, weighted by what the loss feels of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import Loss, MaskOf, Padding, batch_loss, frozen, main_output, mask_of_rows, quiet_eval
from ...calibrate.run import with_main
from ...layers import ConvNd

PLAIN = 0.1
"""Part of the error in which every channel counts by its own variance."""
LEAST = 1e-3
"""Least variance of a channel there, relative to the mean of all."""
ROUNDING = 1e-6
"""Rounding errors of variances, which are differences of sums in fp32, relative to these."""


@dataclass
class OutputMoments:
    r"""Moments of a stage's outputs :math:`y` and of the gradients :math:`g` of the loss there, over rows.

    Args:
        channel_dim: the dimension of the channels.
        rows: number of rows.
        total: the sum of the outputs.
        second: the sum of :math:`y y^T`.
        gradients: the sum of :math:`g g^T`.
    """

    channel_dim: int
    rows: int
    total: Tensor
    second: Tensor
    gradients: Tensor

    def error(self) -> OutputError:
        r"""Returns the error that these moments weight.

        Its weight is :math:`W = L^T L`, the sum of :math:`E[g g^T]` and of the inverse variances of the channels, both
        scaled such that the error of giving the mean output is 1, nine parts to one.
        """
        mean = self.total / self.rows
        covariance = self.second / self.rows - mean[:, None] * mean
        variances = covariance.diagonal().clamp_min(0)
        if variances.sum() <= ROUNDING * self.second.diagonal().sum() / self.rows:  # outputs that never change
            return OutputError(self.channel_dim, torch.eye(len(variances)).to(variances))
        weight = 1 / variances.clamp_min(LEAST * variances.mean())
        weight = torch.diag(weight / (weight @ variances))
        felt = (self.gradients * covariance).sum()
        if felt > 0:
            weight = PLAIN * weight + (1 - PLAIN) * self.gradients / felt
        return OutputError(self.channel_dim, torch.linalg.cholesky(weight).mT)


@dataclass
class OutputError:
    """The mean of :math:`e^T W e` over rows.

    Args:
        channel_dim: the dimension of the channels.
        root: :math:`L`, of :math:`W = L^T L`.
    """

    channel_dim: int
    root: Tensor

    def __call__(self, output: Tensor, expected: Tensor, data: Tensor | None) -> Tensor:
        """Returns the error of one batch.

        Args:
            output: what a stage gives.
            expected: what it should give.
            data: which rows are data, ``None`` for all.
        """
        off = rows_of(output.float() - expected.float(), self.channel_dim, data)
        return (off @ self.root.to(off).mT).square().sum() / max(1, len(off))


def rows_of(value: Tensor, channel_dim: int, data: Tensor | None) -> Tensor:
    """Returns the rows ``[rows, channels]`` of an output that are data.

    Args:
        value: the output, or something of its shape.
        channel_dim: the dimension of the channels.
        data: which rows are data, in the order of the other dimensions; ``None`` for all.
    """
    last = value.movedim(channel_dim, -1)
    found = None if data is None else mask_of_rows(data != 0, tuple(last.shape[:-1]))
    return last.flatten(0, -2) if found is None else last[found[0].to(last.device)]


def channel_dim_of(stage: nn.Module, output: Tensor) -> int:
    """Returns the dimension of the channels: the second one where a convolution puts out so many, else the last.

    Args:
        stage: the module.
        output: what it returned.
    """
    for layer in stage.modules():
        if isinstance(layer, ConvNd) and output.ndim == layer.weight.ndim and output.shape[1] == layer.out_channels:
            return 1
    return -1


def output_moments(
    model: nn.Module, stages: Sequence[str], batches: Iterable[Any], loss: Loss, mask: MaskOf | None
) -> Mapping[str, OutputMoments]:
    """Returns moments of the outputs of stages, over all batches.

    Args:
        model: the dense model.
        stages: names of modules.
        batches: what it is run on.
        loss: the loss whose gradients are taken.
        mask: how the padding of a batch is found.
    """
    found: dict[str, OutputMoments] = {}

    def note(name: str, padding: Padding) -> Callable[..., Any]:
        def hook(stage: nn.Module, _: Any, output: Any) -> Any:
            main = main_output(output)
            if main is None:
                return None
            dim = channel_dim_of(stage, main)
            data = padding.of_activation(main, tuple(main.shape[:-1]))
            rows = rows_of(main.detach().float(), dim, data)
            total, second = rows.sum(0).double(), (rows.mT @ rows).double()
            zeros = torch.zeros_like(total), torch.zeros_like(second), torch.zeros_like(second)
            moments = found.setdefault(name, OutputMoments(dim, 0, *zeros))
            moments.rows += len(rows)
            moments.total += total
            moments.second += second
            shown = main if main.requires_grad else main.detach().requires_grad_()

            def take(gradient: Tensor) -> None:
                rows = rows_of(gradient.float(), dim, data)
                moments.gradients += (rows.mT @ rows).double()

            shown.register_hook(take)
            return None if shown is main else with_main(output, shown)

        return hook

    with ExitStack() as stack:
        stack.enter_context(quiet_eval(model))
        stack.enter_context(frozen(model))
        padding = stack.enter_context(Padding(model, mask))
        for name in stages:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name, padding)).remove)
        for batch in batches:
            batch_loss(batch, loss, padding, "refine_").backward()
    return found
