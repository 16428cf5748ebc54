"""Giving the heads of a model other sizes, after it was tried that nothing else depends on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import forward, main_output, quiet_eval
from ...errors import LowRankError
from .find import Attention, Rotary, Weights, smaller_config_


class HeadSizes:
    """Gives the heads of a model other sizes.

    Args:
        model: the model.
        attentions: its attentions.
        rotary: its rotary embedding.
    """

    def __init__(self, model: nn.Module, attentions: Sequence[Attention], rotary: Rotary) -> None:
        self._model, self._attentions, self._rotary = model, attentions, rotary
        self._config: Any = model.config

    def put_(self, weights: Sequence[Weights], size: int, frequencies: Tensor) -> None:
        """Changes the model and its configuration.

        Args:
            weights: the projections of each attention; scores are those of queries and keys as they were scaled.
            size: entries of a head.
            frequencies: radians per position of each pair.
        """
        smaller_config_(self._config, size, frequencies, self._rotary.module.attention_scaling)
        with torch.device("meta"):
            twin = type(self._model)(copy.deepcopy(self._config))
        for attention, own in zip(self._attentions, weights, strict=True):
            scaling: Any = twin.get_submodule(attention.name).scaling
            ratio = attention.module.scaling / scaling
            queries, bias = own["q_proj"]
            scaled = {"q_proj": (ratio * queries, None if bias is None else ratio * bias)}
            attention.put_({**own, **scaled}, size, scaling)
        self._rotary.put_(self._config)

    def check(self, example: Any, size: int, *, with_target: bool = False) -> None:
        """Raises if the model with some entries of its heads gives something else than with zeros for the others.

        Args:
            example: what the model is run on.
            size: how many entries stay.
            with_target: whether its last item is the target.

        Raises:
            LowRankError: if it does; the model is as it was in any case.
        """
        old = self._attentions[0].size
        pairs = torch.linspace(0, old // 2 - 1, size // 2).long()  # some of all
        rows, entries = torch.cat([pairs, pairs + old // 2]), torch.arange(size)
        try:
            with self._restored():
                for attention in self._attentions:
                    attention.put_(_parts(attention, rows, entries, zeros=True), old, attention.module.scaling)
                expected = self._run(example, with_target)
            with self._restored():
                parts = [_parts(attention, rows, entries, zeros=False) for attention in self._attentions]
                self.put_(parts, size, self._rotary.frequencies[pairs])
                found = self._run(example, with_target)
        except Exception as error:
            raise LowRankError(f"smaller heads: the model does not run with smaller heads ({error}).") from error
        tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
        if expected.shape != found.shape or not float((expected - found).abs().max()) <= tolerance:
            raise LowRankError(
                f"smaller heads: got a {type(self._model).__name__} that uses its heads in another way than a Llama,"
                " expected halves of queries and keys that RoPE turns with each other, and nothing else."
            )

    def _run(self, example: Any, with_target: bool) -> Tensor:
        with quiet_eval(self._model):
            output = main_output(forward(self._model, example, with_target=with_target)[0])
        assert output is not None
        return output

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Gives the model back its projections, its rotary embedding and its configuration."""
        modules = [each.module for each in self._attentions]
        modules += [child for module in modules for child in module.children()]
        states = [(module, dict(vars(module)), dict(module._parameters)) for module in modules]
        config = dict(vars(self._config))
        try:
            yield
        finally:
            for module, attributes, parameters in states:
                vars(module).update(attributes)
                module._parameters.update(parameters)
            setattr(self._rotary.parent, self._rotary.key, self._rotary.module)
            vars(self._config).clear()
            vars(self._config).update(config)


def _parts(attention: Attention, rows: Tensor, entries: Tensor, *, zeros: bool) -> Weights:
    """The projections with some entries of queries and keys, and some of values, of each head; or zeros elsewhere."""

    def take(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
        heads, kept = tensor.unflatten(dim, (-1, attention.size)), kept.to(tensor.device)
        some = heads.index_select(dim + 1, kept)
        whole = torch.zeros_like(heads).index_copy(dim + 1, kept, some)
        found: Tensor = (whole if zeros else some).flatten(dim, dim + 1)
        return found

    parts = {}
    for key, kept in (("q_proj", rows), ("k_proj", rows), ("v_proj", entries)):
        weight, bias = attention.projection(key)
        parts[key] = take(weight, kept, 0), None if bias is None else take(bias, kept, 0)
    weight, bias = attention.projection("o_proj")
    return {**parts, "o_proj": (take(weight, entries, 1), bias)}
