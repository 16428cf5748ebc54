"""LoftQ's start: adapters begin as the best approximation of what quantizing took from the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import LowRankError
from ..lookup import Source, tensor_for
from .base import InitContext, LoRAFactors, LoRAInit, check_fits, leading_triplets, singular_values


@dataclass(frozen=True, eq=False)
class LoftQ(LoRAInit):
    """The adapter starts as the best approximation of what quantizing took from the weight, and stays on.

    The base may be quantized in place, by torchao (linear layers), or compressed. To quantize weights and choose
    adapters together, see :func:`loftq_`.

    Args:
        reference: the model before its weights were quantized, or its state dict.

    Raises:
        LowRankError: for anything but a model or a state dict.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_((model[0].weight * 8).round() / 8)
        >>> model = lr.add_lora_(model, rank=8, init=lr.LoftQ(reference))
        >>> torch.allclose(model[0].weight, reference["0.weight"], atol=1e-5)
        True

    Reference:
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, ICLR 2024, algorithm 1.
    """

    reference: Source = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.reference, (nn.Module, Mapping)):
            raise LowRankError(
                f"LoftQ: got a reference of type {type(self.reference).__name__}, expected the model before its weights"
                " were quantized, or its state dict."
            )

    def factors(self, context: InitContext) -> LoRAFactors:
        """The factors of one weight's adapter."""
        if not context.scaling > 0:
            raise LowRankError(f"add_lora_: init LoftQ needs a positive scaling, got {context.scaling:g}.")
        up, values, down = leading_triplets(self._difference(context), context.rank)
        roots = (values / context.scaling).sqrt()
        # where quantizing took nothing, one of the two factors has to be other than zero to learn
        return LoRAFactors(torch.where(roots > 0, roots, 1)[..., None] * down, up * roots[..., None, :])

    def singular_values(self, context: InitContext) -> Tensor:
        """The singular values of what quantizing took."""
        return singular_values(self._difference(context))

    def _difference(self, context: InitContext) -> Tensor:
        remedy = "the model, or state dict, before its weights were quantized"
        reference = check_fits(tensor_for(self.reference, context.weight), context, "LoftQ", remedy)
        return context.weight.layout.matrix(reference - context.weight.values.to(reference))
