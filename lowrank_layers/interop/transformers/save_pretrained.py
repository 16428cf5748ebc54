"""``save_pretrained`` of transformers for models with low-rank layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import LowRankError
from ...modules import QUANT_METHOD, ModelDescription, check_factors
from .quantization_config import LowRankConfig
from .quantizer import LowRankQuantizer
from .remote_code import check_remote_code, write_remote_code

_KEY = "quantization_config"


def describing(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the method so that ``config.json`` describes the low-rank layers that the model has at that moment.

    Its new argument ``remote_code`` adds the code of the layers, so that the folder is read without this library.

    Args:
        save_pretrained: transformers' method.
    """

    @functools.wraps(save_pretrained)
    def save(self: Any, save_directory: Any, *args: Any, remote_code: bool = False, **kwargs: Any) -> Any:
        if remote_code:
            check_remote_code(self)
            if kwargs.get("push_to_hub"):
                raise LowRankError(
                    "save_pretrained: got remote_code=True and push_to_hub=True, but files are uploaded before the code"
                    " is written; save the folder, and upload it as it is then."
                )
            kwargs["save_original_format"] = False  # which is looked up by the type of the model
        with _described(self):
            result = save_pretrained(self, save_directory, *args, **kwargs)
        if remote_code and kwargs.get("is_main_process", True):
            write_remote_code(self, Path(save_directory))
        return result

    return save


@contextmanager
def _described(model: Any) -> Iterator[None]:
    """Gives the configuration of a factored model its description, and takes that of another one away.

    transformers asks the quantizer of a model for the tensors to write, and then ignores the ``state_dict=`` that
    Trainer passes; it is out of the way meanwhile.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is written
        yield
        return
    check_factors(model)
    config, own = model.config, vars(model)
    description = ModelDescription.of(model)
    before = getattr(config, _KEY, None)
    factored = bool(description.layers or description.opened or description.resized)
    if not factored and _method(before) != QUANT_METHOD:
        yield
        return
    quantizer = own.get("hf_quantizer")
    if quantizer is not None and not isinstance(quantizer, LowRankQuantizer) and not _has_dequantized(quantizer):
        raise LowRankError(
            f"save_pretrained: the model has low-rank layers and is quantized with {_method(before)!r}, which a"
            " config.json cannot both describe; factorize and save it first, and quantize it when it is loaded."
        )
    own.pop("hf_quantizer", None)
    if factored:
        setattr(config, _KEY, LowRankConfig(description=description))
    else:
        delattr(config, _KEY)
    try:
        yield
    finally:
        if before is not None:
            setattr(config, _KEY, before)
        else:
            delattr(config, _KEY)
        if quantizer is not None:
            own["hf_quantizer"] = quantizer


def _has_dequantized(quantizer: Any) -> bool:
    """Whether the weights were quantized in the file only, as those of GGUF are without a kernel for them."""
    return bool(getattr(quantizer.quantization_config, "dequantize", False))


def _method(quantization_config: Any) -> str | None:
    """The name of the method of a configuration, which is an object or, after reading it, a dict."""
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method")
    method = getattr(quantization_config, "quant_method", None)
    return getattr(method, "value", method)
