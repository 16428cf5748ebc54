"""A folder that transformers reads without this library: the code of the layers and of the model lies in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from ...errors import LowRankError
from ...files import replacing
from ...modules import QUANT_METHOD, ModelDescription
from . import remote_layers

_FILE = "modeling_lowrank"
_PAIRS = ("LowRankLinear", "LowRankTransposedLinear", "LowRankEmbedding")
_PIVOTS = ("PivotLinear", "PivotTransposedLinear")
_CLASSES = '''

class LowRank{config}(transformers.{config}):
    """``{config}`` with ``low_rank_layers``."""

    model_type = "{model_type}"


class LowRank{model}(transformers.{model}):
    """``{model}`` with the low-rank layers and the sizes that ``config.json`` names."""

    config_class = LowRank{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        resize_(self, config.resized_layers)
        make_low_rank_(self, config.low_rank_layers)
'''


def check_remote_code(model: Any) -> None:
    """Raises if the code of the model cannot be written: it is not transformers' own, or has layers of other kinds.

    Args:
        model: a factored model.

    Raises:
        LowRankError: with the name of the class or layer.
    """
    for kind in (type(model), type(model.config)):
        if getattr(transformers, kind.__name__, None) is not kind:
            raise LowRankError(
                f"save_pretrained(remote_code=True): got a {kind.__name__}, expected a class of transformers, which the"
                " code in the folder can derive from; leave remote_code out, and read the folder after import"
                " lowrank_layers."
            )
    description = ModelDescription.of(model)
    odd = [
        f"{name!r} ({spec.type})"
        for name, spec in description.layers.items()
        if spec.type not in (*_PAIRS, *_PIVOTS) or spec.form or spec.bits
    ]
    odd += [repr(name) for name in description.opened]
    odd += [
        f"{name!r} ({spec['type']} of another size)"
        for name, spec in description.resized.items()
        if spec["type"] != "Linear"
    ]
    if odd:
        raise LowRankError(
            f"save_pretrained(remote_code=True): writes low-rank linear layers and embeddings in floating point, and"
            f" linear layers of other sizes, and the model has others: {', '.join(odd[:5])}; skip them in make_plan, or"
            " leave remote_code out."
        )


def write_remote_code(model: Any, folder: Path) -> None:
    """Adds the code to a folder that ``save_pretrained`` wrote, and makes its ``config.json`` ask for it.

    The type of the model becomes one that transformers does not know, so that a reader who does not allow the code gets
    an error, and not a dense model with random layers.

    Args:
        model: the model in the folder.
        folder: the folder.
    """
    names = {"model": type(model).__name__, "config": type(model.config).__name__}
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    described = config.pop("quantization_config", None)
    if described is None:  # an ordinary folder
        return
    config["low_rank_layers"] = {
        name: {"rank": each["rank"], "bias": each["bias"], "pivot": each["type"] in _PIVOTS}
        for name, each in described["layers"].items()
    }
    config["resized_layers"] = {
        name: {side: each[side] for side in ("in_features", "out_features")}
        for name, each in described.get("resized", {}).items()
    }
    config["model_type"] = f"{QUANT_METHOD}_{config['model_type']}"
    config["architectures"] = [f"LowRank{names['model']}"]
    config["auto_map"] = {"AutoConfig": f"{_FILE}.LowRank{names['config']}"}
    config["auto_map"] |= dict.fromkeys(_auto_classes(model), f"{_FILE}.LowRank{names['model']}")
    code = Path(remote_layers.__file__).read_text(encoding="utf-8")
    with replacing(folder / f"{_FILE}.py") as temporary:
        temporary.write_text(code + _CLASSES.format(**names, model_type=config["model_type"]), encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _auto_classes(model: Any) -> list[str]:
    """Names of the classes that build a model of this class from its configuration."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(model.config) in mapping:
            kinds = mapping[type(model.config)]
            if type(model) in (kinds if isinstance(kinds, tuple) else (kinds,)):
                found.append(name)
    return found
