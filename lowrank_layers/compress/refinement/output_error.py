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
WIDE = 8192
"""Channels above which their moments are diagonals, and what the dense model gives is computed each time."""
ROUNDING = 1e-6
"""Rounding errors of variances, which are differences of sums in fp32, relative to these."""


@dataclass
class OutputMoments:
    r"""Moments of a stage's outputs :math:`y` and of the gradients :math:`g` of the loss there, over rows.

    Args:
        channel_dim: the dimension of the channels.
        rows: number of rows.
        total: the sum of the outputs.
        second: the sum of :math:`y y^T`; its diagonal where the outputs are wide, such as logits of a vocabulary.
        gradients: the sum of :math:`g g^T`, or its diagonal.
    """

    channel_dim: int
    rows: int
    total: Tensor
    second: Tensor
    gradients: Tensor

    @classmethod
    def before_any(cls, channel_dim: int, channels: int, device: torch.device) -> OutputMoments:
        """Returns those of no rows.

        Args:
            channel_dim: the dimension of the channels.
            channels: how many there are.
            device: where they are summed.
        """
        shape = (channels,) if channels > WIDE else (channels, channels)
        total = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(channel_dim, 0, total, total.new_zeros(shape), total.new_zeros(shape))

    @property
    def is_wide(self) -> bool:
        """Whether there are so many channels that only diagonals are known."""
        return self.second.ndim == 1

    def product(self, rows: Tensor) -> Tensor:
        """Returns the second moment of some rows, summed, as far as it is known here.

        Args:
            rows: ``[rows, channels]``.
        """
        return (rows.square().sum(0) if self.is_wide else rows.mT @ rows).double()

    def error(self) -> OutputError:
        r"""Returns the error that these moments weight.

        Its weight is :math:`W = L^T L`, the sum of :math:`E[g g^T]` and of the inverse variances of the channels, both
        scaled such that the error of giving the mean output is 1, nine parts to one.
        """
        mean = self.total / self.rows
        covariance = self.second / self.rows - (mean.square() if self.is_wide else mean[:, None] * mean)
        variances, seconds = ((x if self.is_wide else x.diagonal()) for x in (covariance, self.second))
        variances = variances.clamp_min(0)
        if variances.sum() <= ROUNDING * seconds.sum() / self.rows:  # outputs that never change
            return OutputError(self.channel_dim, torch.ones_like(variances))
        weight = 1 / variances.clamp_min(LEAST * variances.mean())
        weight = weight / (weight @ variances)
        weight = weight if self.is_wide else torch.diag(weight)
        felt = (self.gradients * covariance).sum()
        if felt > 0:
            weight = PLAIN * weight + (1 - PLAIN) * self.gradients / felt
        return OutputError(self.channel_dim, weight.sqrt() if self.is_wide else torch.linalg.cholesky(weight).mT)


@dataclass
class OutputError:
    """The mean of :math:`e^T W e` over rows.

    Args:
        channel_dim: the dimension of the channels.
        root: :math:`L`, of :math:`W = L^T L`, or its diagonal where it has nothing else.
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
        root = self.root.to(off)
        return (off * root if root.ndim == 1 else off @ root.mT).square().sum() / max(1, len(off))


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
            if name not in found:
                found[name] = OutputMoments.before_any(dim, rows.shape[1], rows.device)
            moments = found[name]
            moments.rows += len(rows)
            moments.total += rows.sum(0).double()
            moments.second += moments.product(rows)
            shown = main if main.requires_grad else main.detach().requires_grad_()

            def take(gradient: Tensor) -> None:
                rows = rows_of(gradient.float(), dim, data)
                moments.gradients += moments.product(rows)

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
