"""Finding the rotary attentions of a model of transformers that can have smaller heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...errors import LowRankError
from ...layers import bias_of, weight_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FIXED = ("default", "linear", "llama3", "yarn", "longrope")
"""Rotations whose frequencies do not depend on the length of what is read."""

Weights = Mapping[str, tuple[Tensor, Tensor | None]]
"""Weight and bias of each projection."""


@dataclass(frozen=True)
class Attention:
    """One attention: queries of several heads read the keys and values of each group.

    Args:
        name: its name.
        module: the module.
    """

    name: str
    module: Any

    @property
    def size(self) -> int:
        """Entries of a head."""
        return int(self.module.head_dim)

    @property
    def groups(self) -> int:
        """Number of heads of keys and values."""
        return int(self.module.k_proj.out_features) // self.size

    @property
    def heads(self) -> int:
        """Number of heads of queries that a group has."""
        return int(self.module.q_proj.out_features) // int(self.module.k_proj.out_features)

    def projection(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a projection, in fp64."""
        layer = getattr(self.module, key)
        bias = bias_of(layer)
        return weight_of(layer).detach().double(), None if bias is None else bias.detach().double()

    def put_(self, weights: Weights, size: int, scaling: float) -> None:
        """Gives the attention projections of other sizes.

        Args:
            weights: weight and bias of each that changes.
            size: entries of a head.
            scaling: what scores are multiplied with.
        """
        for key, values in weights.items():
            layer = getattr(self.module, key)
            for name, tensor in zip(("weight", "bias"), values, strict=True):
                old = getattr(layer, name)
                if tensor is not None:
                    setattr(layer, name, nn.Parameter(tensor.to(old).contiguous(), old.requires_grad))
            layer.out_features, layer.in_features = layer.weight.shape
        self.module.head_dim, self.module.scaling = size, scaling


@dataclass(frozen=True)
class Rotary:
    """The module that makes the angles of all attentions.

    Args:
        parent: the module that it is a child of.
        key: its name there.
        module: the module.
    """

    parent: nn.Module
    key: str
    module: Any

    @property
    def frequencies(self) -> Tensor:
        """Radians per position of each pair."""
        return self.module.inv_freq.detach().double().clone()  # type: ignore[no-any-return]

    def put_(self, config: Any) -> None:
        """Replaces it by one for another configuration."""
        with self.module.inv_freq.device:
            new = type(self.module)(config)
        setattr(self.parent, self.key, new.train(self.module.training))


def find_attentions(model: nn.Module) -> tuple[list[Attention], Rotary]:
    """Returns the attentions and their rotary embedding.

    Args:
        model: a model of transformers.

    Raises:
        LowRankError: if it has none, or others than those whose sizes a configuration can say.
    """
    config: Any = getattr(model, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_type" not in parameters:
        _refuse(f"a {type(model).__name__} whose configuration has no rope_parameters for all layers")
    long, short = parameters.get("long_factor"), parameters.get("short_factor")
    if parameters["rope_type"] not in _FIXED or long != short:
        _refuse(f"frequencies that depend on the length ({parameters['rope_type']})")
    found = list(_attentions(model))
    embeddings = [
        Rotary(parent, key, child)
        for parent in model.modules()
        for key, child in parent.named_children()
        if isinstance(getattr(child, "inv_freq", None), Tensor)
    ]
    if not found or len(embeddings) != 1:
        _refuse(f"{len(found)} attentions with {', '.join(PROJECTIONS)} and {len(embeddings)} rotary embeddings")
    sizes = {each.size for each in found}
    if sizes != {2 * len(embeddings[0].frequencies)}:
        _refuse(f"heads of {sorted(sizes)} entries, of which {2 * len(embeddings[0].frequencies)} are rotated")
    return found, embeddings[0]


def _attentions(model: nn.Module) -> Iterator[Attention]:
    """The attentions in a model, or raises where one of them has more than a Llama's."""
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if not {*PROJECTIONS} <= {*children}:
            continue
        odd = [key for key in PROJECTIONS if type(children[key]) is not nn.Linear]
        odd += [key for key, child in children.items() if key not in PROJECTIONS and [*child.parameters()]]
        odd += [key for key in ("head_dim", "scaling") if not isinstance(getattr(module, key, None), (int, float))]
        if odd:
            _refuse(f"{name!r} with {odd[0]!r}, which is not as in a Llama")
        yield Attention(name, module)


def _refuse(what: str) -> NoReturn:
    """Raises, with what was got."""
    raise LowRankError(
        f"smaller heads: got {what}, expected a dense model of transformers with rotary attentions as a Llama has."
    )


def smaller_config_(config: Any, size: int, frequencies: Tensor, attention_scaling: float) -> None:
    """Gives a configuration heads of another size, with pairs of given frequencies.

    Frequencies stand in a configuration as LongRoPE's factors, by which those of RoPE are divided.

    Args:
        config: the configuration, changed in place.
        size: entries of a head.
        frequencies: radians per position of each pair, ``[size / 2]``.
        attention_scaling: what cosines and sines are multiplied with.
    """
    theta = float(config.rope_parameters["rope_theta"])
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    factors = (1 / (frequencies.cpu().double() * theta**exponents)).tolist()
    config.head_dim = size
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": attention_scaling,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
