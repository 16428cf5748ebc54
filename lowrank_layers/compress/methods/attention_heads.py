"""Smaller heads: the projections of all attentions of a model become smaller together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...calibrate.statistics import Statistics
from ...checks import is_integer
from ...errors import LowRankError
from ..attention_heads.find import find_attentions
from ..attention_heads.group import HeadGroup
from ..short_example import short_example


@dataclass(frozen=True)
class AttentionHeadsMethod:
    """Makes the heads of a language model's attentions smaller, as :func:`reduce_head_dim_` does, in a plan.

    All attentions of a model have heads of one size, which its configuration says, so that the projections of queries,
    keys, values and outputs of all of them take this method together, or none of them does. They stay ordinary layers,
    and the model one of its class with another ``head_dim``. In a plan the method competes with those for single
    layers, beside hidden units. Models with other attentions than those of a Llama are left alone.

    It is on request, and needs statistics: ``methods=[*lr.METHODS.values(), lr.AttentionHeadsMethod()]``; it is none of
    ``METHODS``, whose members take one layer. ``make_plan(uniform=True)`` takes it with :class:`HiddenUnitsMethod`, and
    leaves a folder of ``save_pretrained`` that is read without this library.

    The growth of the loss is that of the output projections, for the values that go, and that of the projections of
    keys, for the pairs that go from queries and keys. With gradients the values that stay are those that matter most
    for the loss, and not for the plain outputs as in :func:`reduce_head_dim_`. Without gradients queries and keys count
    by the part of their products that is lost.

    Args:
        context: the largest distance of two tokens that counts in the choice of frequencies, as in
            :func:`reduce_head_dim_`.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=2, **sizes))
        >>> batches = [{"input_ids": torch.randint(100, (4, 32))}]
        >>> stats = lr.calibrate(model, batches, loss=lr.SampledCrossEntropy())
        >>> plan = lr.make_plan(model, lr.Budget(params=0.85), stats, [lr.AttentionHeadsMethod()])
        >>> model = lr.factorize_(model, plan, stats, batches)
        >>> model.config.head_dim == plan["model.layers.0.self_attn.k_proj"].rank
        True
    """

    context: int = 1024

    name: ClassVar[str] = "attention_heads"

    def find(self, model: nn.Module, stats: Statistics) -> list[HeadGroup]:
        """Returns the heads of a model as one group, or no group where they cannot become smaller.

        Args:
            model: the dense model; it is as before afterwards.
            stats: its statistics, on whose example it is run.

        Raises:
            LowRankError: if the context is no number of tokens, or the statistics have no example.
        """
        if not is_integer(self.context, 1):
            raise LowRankError(f"AttentionHeadsMethod: got context={self.context!r}, expected a number of tokens.")
        try:
            attentions, _ = find_attentions(model)
        except LowRankError:
            return []
        short_example(model, stats, type(self).__name__)  # raises where there is none
        group = HeadGroup(tuple(each.name for each in attentions), attentions[0].size, self.context)
        try:
            group.check(model, stats, max(group.step, group.count // 4 * 2))
        except LowRankError:
            return []
        return [group] if group.count > group.step else []

    def read(self, settings: Mapping[str, Any]) -> HeadGroup:
        """Returns the group that a plan's file holds.

        Args:
            settings: what its ``settings`` returned.
        """
        try:
            group = HeadGroup(**settings)
            names = isinstance(group.attentions, tuple) and all(isinstance(each, str) for each in group.attentions)
            is_good = names and is_integer(group.count, 2) and is_integer(group.context, 1) and bool(group.attentions)
        except TypeError:
            is_good = False
        if not is_good:
            raise LowRankError(
                f"the method 'attention_heads' does not take the settings {dict(settings)!r}, expected attentions,"
                " count and context; plan anew."
            )
        return group
