"""How adapters start, one init per file; :class:`LoRAInit` is what an init of one's own derives from."""

from ...errors import LowRankError
from .base import LoRAInit
from .gaussian import Gaussian
from .kaiming import Kaiming
from .olora import OLoRA
from .orthogonal import Orthogonal
from .pissa import PiSSA

INITS: dict[str, type[LoRAInit]] = {
    "kaiming": Kaiming,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "pissa": PiSSA,
    "olora": OLoRA,
}
"""The inits that need nothing but the weight, by the names that ``add_lora_`` takes."""

_WITH_INPUTS = {
    "eva": "EVA(stats)",
    "corda": "CorDA(stats)",
    "lora-ga": "LoRAGA(gradients)",
    "loftq": "LoftQ(reference)",
}
"""What to write for an init that needs more than the weight, by the name that it goes by elsewhere."""


def find_init(init: object) -> LoRAInit:
    """The init of a name, or the given one.

    Raises:
        LowRankError: for an unknown name, or anything that is neither a name nor an init.
    """
    if isinstance(init, LoRAInit):
        return init
    if isinstance(init, str) and init in INITS:
        return INITS[init]()
    if isinstance(init, str) and init in _WITH_INPUTS:
        raise LowRankError(f"add_lora_: init {init!r} needs input of its own; write init={_WITH_INPUTS[init]}.")
    raise LowRankError(
        f"add_lora_: got init {init!r}, expected one of {list(INITS)}, or an init such as {_WITH_INPUTS['eva']}."
    )
