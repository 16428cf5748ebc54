"""PowerSGD: one bucket of gradients averaged over processes at low rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import to_unit
from .collectives import Collectives
from .error_feedback import GradientMemory
from .exchange import Averaged, Exchange
from .matricize import matricize, thin_matmul, unmatricize
from .settings import PowerSGDSettings


class PowerSGD:
    """Averages the gradients of a bucket: factors of those that are compressed, the others as they are.

    Args:
        settings: dtype on the wire, and whether both factors are sent in each step.
        collectives: the processes.
    """

    def __init__(self, settings: PowerSGDSettings, collectives: Collectives) -> None:
        self.settings, self.collectives = settings, collectives
        self.exchange = Exchange(collectives, settings.wire)

    def average_(self, bucket: Tensor, gradients: Sequence[tuple[Tensor, GradientMemory | None]], step: int) -> int:
        """Averages the gradients in place and updates their memories; returns the bytes sent.

        Where a gradient is not finite in any process, the first exchange shows it in all of them: the memories stay as
        they were, and the bucket is averaged uncompressed. A gradient that is zero in every process stays zero and
        keeps its error, since DDP would drop what an unused parameter were given.

        Args:
            bucket: the flat tensor that the gradients are views of.
            gradients: each gradient with its memory, or with ``None`` where it is not compressed.
            step: number of the step.
        """
        compressions = [Compression(gradient, memory, step) for gradient, memory in gradients if memory is not None]
        whole = [gradient for gradient, memory in gradients if memory is None]
        if not compressions and bucket.dtype == self.exchange.wire == torch.float32:
            self.collectives.mean_(bucket)
            return bucket.nbytes
        # vectors are always sent as beside factors: after a restart they may share a bucket with some
        nonzero = torch.cat([torch.zeros(0, device=bucket.device), *(each.nonzero for each in compressions)])
        averaged = self._exchange(compressions, [nonzero, *whole])
        sent = averaged.sent
        if not averaged.finite:
            for each in compressions:
                each.restore_gradient()
            self.collectives.mean_(bucket)
            return sent + bucket.nbytes
        contributions = []
        sending = []
        for each, contribution, anywhere in zip(compressions, averaged.contributions, nonzero.tolist(), strict=True):
            if anywhere:
                sending.append(each)
                contributions.append(contribution)
            else:
                each.postpone()
        if not self.settings.alternate:
            for each in sending:
                each.compute_second_factor()
            averaged = self._exchange(sending, [])
            sent, contributions = sent + averaged.sent, averaged.contributions
            if not averaged.finite:
                for each in sending:
                    each.gradient.fill_(torch.nan)
                return sent
        for each, contribution in zip(sending, contributions, strict=True):
            each.decompress(contribution.mT)
        return sent

    def _exchange(self, compressions: Sequence[Compression], whole: Sequence[Tensor]) -> Averaged:
        factors, keys = [each.factor.mT for each in compressions], [each.memory.key for each in compressions]
        return self.exchange.average_(factors, whole, keys)


class Compression:
    r"""One gradient in one step: its sum :math:`M` with the error of before, a basis, and their product.

    The first factor is :math:`P = M Q`; with ``alternate`` in every second step it is :math:`M^T P`.

    Args:
        gradient: gradient of any shape. Where it is fp32, the sum stands in its place during the step.
        memory: its error and directions.
        step: number of the step.
    """

    def __init__(self, gradient: Tensor, memory: GradientMemory, step: int) -> None:
        rows, columns = memory.shape[1:]
        # at full rank the product with the basis of the shorter side is exact
        right_first = rows <= columns if memory.full_rank else step % 2 == 1
        self.is_right = memory.settings.alternate and right_first
        self.gradient, self.memory = gradient, memory
        with memory.stopwatch.running():
            matrix = matricize(gradient)
            if matrix.data_ptr() % 64:
                # BLAS rounds otherwise on unaligned memory, and buckets rebuilt after a restart move gradients about
                matrix = matrix.clone()
            self.nonzero = ((matrix.amax() != 0) | (matrix.amin() != 0)).float().reshape(1)
            self.in_place = matrix.dtype == torch.float32 and matrix.data_ptr() == gradient.data_ptr()
            self.sum = matrix.float()
            if memory.settings.error_feedback:
                self.sum.add_(memory.error)
            self.basis = memory.basis(step, left=self.is_right)
            if self.is_right:
                self.factor = thin_matmul(self.sum.mT, self.basis)
            else:
                self.factor = thin_matmul(self.sum, self._iterated())

    def compute_second_factor(self) -> None:
        """Makes the averaged first factor the basis, and computes the product with it."""
        with self.memory.stopwatch.running():
            self.basis = torch.linalg.qr(self.factor).Q
            self.factor, self.is_right = thin_matmul(self.sum.mT, self.basis), True

    def restore_gradient(self) -> None:
        """Subtracts the error again, up to rounding."""
        if self.in_place and self.memory.settings.error_feedback:
            self.sum.sub_(self.memory.error)

    def postpone(self) -> None:
        """Makes the sum the next error, and the gradient zero."""
        if self.memory.settings.error_feedback:
            self.memory.error = self.sum
        self.gradient.zero_()

    def decompress(self, contribution: Tensor) -> None:
        """Overwrites the gradient with the product of basis and averaged factor, and updates the memory.

        Args:
            contribution: this process's contribution to the averaged factor. The part of the sum that its product with
                the basis lacks is the next error.
        """
        with self.memory.stopwatch.running():
            left, right = self._pair(self.factor)
            self.memory.keep_factors(left, right)
            if self.memory.settings.error_feedback:
                own_left, own_right = self._pair(contribution)
                self.memory.error = self.sum.baddbmm_(own_left, own_right.mT, alpha=-1)
            if self.in_place:
                torch.bmm(left, right.mT, out=self.sum)
            else:
                self.gradient.copy_(unmatricize(left @ right.mT, self.gradient.shape))

    def _pair(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        return (self.basis, factor) if self.is_right else (factor, self.basis)

    def _iterated(self) -> Tensor:
        """The basis after local subspace iterations on this process's sum, with the signs of the basis.

        The first factor only gives a basis for the second one, so each process may multiply with its own.
        """
        basis = self.basis
        if self.memory.settings.alternate or self.memory.full_rank:
            return basis
        for _ in range(self.memory.settings.local_iterations):
            basis, triangle = torch.linalg.qr(thin_matmul(self.sum.mT, to_unit(thin_matmul(self.sum, basis))))
            basis = basis * torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        return basis
