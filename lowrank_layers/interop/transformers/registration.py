"""Telling transformers about the format, once it is imported."""

from __future__ import annotations

from ...modules import QUANT_METHOD


def register() -> None:
    """Registers the format ``lowrank`` with transformers, and makes ``save_pretrained`` write it.

    The first half are transformers' own registries of quantization methods. For the second it has none:
    ``PreTrainedModel.save_pretrained`` is wrapped, which describes a model with low-rank layers in ``config.json`` and
    passes every other one on as it is.
    """
    try:
        from transformers.quantizers.auto import (
            AUTO_QUANTIZER_MAPPING,
            register_quantization_config,
            register_quantizer,
        )
    except ImportError:  # a version that is too old; there is nothing to register with
        return
    from transformers import modeling_utils

    from .quantization_config import LowRankConfig
    from .quantizer import LowRankQuantizer
    from .save_pretrained import describing

    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(LowRankConfig)
    register_quantizer(QUANT_METHOD)(LowRankQuantizer)
    model = modeling_utils.PreTrainedModel
    model.save_pretrained = describing(model.save_pretrained)  # type: ignore[method-assign]
