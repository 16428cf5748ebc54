"""vLLM serves models with low-rank layers: ``vllm serve FOLDER`` on what ``save_pretrained`` has written.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` of this package and calls it in each of its
processes. Importing this package does not import vLLM.
"""

from __future__ import annotations

from ...modules import QUANT_METHOD


def register() -> None:
    """Registers the format ``lowrank`` with vLLM; it may be called several times."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .quantization_config import VLLMLowRankConfig

    register_quantization_config(QUANT_METHOD)(VLLMLowRankConfig)
