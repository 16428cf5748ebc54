"""What transformers calls while it loads a model with low-rank layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ...compress import densify_
from ...errors import CheckpointError, LowRankError
from ...layers import is_compressed
from ...modules import replace_, walk_layers
from .check_files import check_files, check_none_is_missing
from .names import fitted_to
from .quantization_config import LowRankConfig


class LowRankQuantizer(HfQuantizer):
    """Swaps low-rank layers in before weights are loaded, or factorizes a dense model after they are.

    A model that has been loaded is an ordinary one for transformers, which trains, casts and moves it like any other.
    """

    quantization_config: LowRankConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises if a dense model is to be loaded and nothing says how it becomes low-rank."""
        if not self.pre_quantized and self.quantization_config.description is not None:
            raise LowRankError(
                "from_pretrained: the folder holds a dense model, and quantization_config= describes the layers of a"
                " factored one; expected LowRankConfig(budget=...), with rank= or with plan=."
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        description = self.quantization_config.description
        if description is None:
            return
        try:
            description = fitted_to(model, description)
            replace_(model, description.build(model))
        except CheckpointError:
            raise
        except LowRankError as error:
            raise CheckpointError(f"config.json: quantization_config: {error}{_versions(model)}") from None
        for _, module in walk_layers(model):
            if is_compressed(module):
                module._is_hf_initialized = True  # type: ignore[assignment]
        _keep_ties_of_parameters(model)
        check_files(model, checkpoint_files or [])
        check_none_is_missing(model)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Factorizes a dense model; then what transformers forbids quantized models is allowed again.

        Args:
            model: the model with all its weights.
            **kwargs: not used.
        """
        if self.quantization_config.description is None:
            _check_in_one_place(model)
            self.quantization_config.factorize_(model)
        model.is_quantized = False
        del model.quantization_method
        model.config.quantization_config = self.quantization_config
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify_(model).to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Returns that ``save_pretrained`` writes such models."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """They need no adapters to be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Low-rank layers compile as their children do."""
        return True


def _versions(model: Any) -> str:
    """What to say of the version that saved the folder, if it is another one: names of layers may differ then."""
    saved = getattr(model.config, "transformers_version", None)
    if saved in (None, transformers.__version__):
        return ""
    return f" (It was saved by transformers {saved}, and read by {transformers.__version__}.)"


def _keep_ties_of_parameters(model: Any) -> None:
    """Forgets the ties of weights that are products of factors now, which transformers would look up as parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {a: b for a, b in tied.items() if a in parameters and b in parameters}


def _check_in_one_place(model: nn.Module) -> None:
    """Raises if a layer is offloaded or hooked by accelerate, so that its weight is not there to be factorized."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise LowRankError(
            "from_pretrained: the model is spread over several devices, so that it cannot be factorized while it is"
            " loaded; load it onto one device (device_map='cpu'), save it, and load what was saved with any device_map."
        )
