"""The configuration that transformers reads and writes for models with low-rank layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...compress import Plan, factorize_, make_plan
from ...errors import LowRankError
from ...modules import (
    QUANT_METHOD,
    ModelDescription,
    Selector,
    from_quantization_config,
    to_quantization_config,
)
from ...rank import Budget, Rank
from ...rank.budget import as_budget


class LowRankConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` of transformers makes a model low-rank, passed as its ``quantization_config``.

    A dense model is factorized without data as soon as it is loaded: by its weights alone. What calibration data adds
    is most of the quality; :func:`make_plan` and :func:`factorize_` take them.

    Args:
        budget: the limits on the whole model.
        rank: instead of a budget: one rank or rule for every layer.
        plan: instead of both: a plan that :func:`make_plan` made.
        skip: layers to leave alone, as in :func:`make_plan`.
        description: instead of all of these: what a factored model is, as transformers reads it from its folder.
        bits: 8 offers layers in int8 too, under a budget of bytes, as in :func:`make_plan`.

    Raises:
        LowRankError: if not exactly one of ``budget``, ``rank``, ``plan`` and ``description`` is given.

    Examples:
        >>> import tempfile, transformers
        >>> sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        >>> dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **sizes))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dense.save_pretrained(folder)
        ...     config = lr.LowRankConfig(budget=lr.Budget(params=0.6))
        ...     small = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        ...     small.save_pretrained(folder)
        ...     same = transformers.AutoModelForCausalLM.from_pretrained(folder)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> torch.equal(same(tokens).logits, small(tokens).logits)
        True
        >>> small.num_parameters() <= 0.6 * dense.num_parameters()
        True
    """

    def __init__(
        self,
        budget: Budget | None = None,
        rank: Rank | None = None,
        plan: Plan | None = None,
        skip: Iterable[Selector] = (),
        description: ModelDescription | None = None,
        bits: int | None = None,
    ) -> None:
        ways = {"budget": budget, "rank": rank, "plan": plan, "description": description}
        given = [name for name, way in ways.items() if way is not None]
        if len(given) != 1:
            raise LowRankError(
                f"LowRankConfig: got {' and '.join(given) or 'nothing to factorize by'}, expected one of budget=, as in"
                " Budget(params=0.6), rank= and plan=."
            )
        if budget is not None:
            as_budget(budget)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.budget = budget
        self.rank = rank
        self.plan = plan
        self.skip = tuple(skip)
        self.description = description
        self.bits = bits

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads what :meth:`to_dict` returned of a factored model.

        Args:
            config_dict: the values.
            return_unused_kwargs: whether ``kwargs`` are returned as well.
            **kwargs: other arguments, of which none is used.

        Raises:
            CheckpointError: for another version of the format, and values that are damaged.
        """
        config = cls(description=from_quantization_config(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def factorize_(self, model: nn.Module) -> None:
        """Factorizes a dense model, in place, and describes the outcome from then on.

        Args:
            model: the model.
        """
        plan = self.plan
        if plan is None:
            plan = make_plan(model, self.budget, skip=self.skip, rank=self.rank, bits=self.bits)
        factorize_(model, plan)
        self.description = ModelDescription.of(model)

    def __repr__(self) -> str:
        if self.description is not None:
            return f"LowRankConfig({len(self.description.layers)} layers)"
        ways = {"budget": self.budget, "rank": self.rank, "plan": self.plan and f"{len(self.plan)} layers"}
        return f"LowRankConfig({', '.join(f'{name}={way}' for name, way in ways.items() if way is not None)})"

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``config.json`` holds: the low-rank layers, as soon as they are known."""
        if self.description is None:
            return {"quant_method": QUANT_METHOD}
        return to_quantization_config(self.description)
