"""transformers reads and writes models with low-rank layers: ``save_pretrained`` and ``from_pretrained``.

Importing this package does not import transformers. It waits for ``transformers.modeling_utils`` to be imported, and
registers the format then.
"""

from typing import TYPE_CHECKING

from ...errors import MissingExtraError
from .import_hook import after_import
from .registration import register

if TYPE_CHECKING:
    from .quantization_config import LowRankConfig as LowRankConfig
else:

    def __getattr__(name: str) -> object:
        if name != "LowRankConfig":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import transformers  # noqa: F401 - only to tell its absence from other errors
        except ImportError as error:
            raise MissingExtraError(
                'LowRankConfig needs transformers: pip install "lowrank-layers[transformers]".'
            ) from error
        from .quantization_config import LowRankConfig

        return LowRankConfig


after_import("transformers.modeling_utils", register)
