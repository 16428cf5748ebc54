"""Smaller heads of attention, in a model that its class still describes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate import MaskOf, calibrate, check_batches, forward, main_output, quiet_eval
from ...calibrate.example import first_sample
from ...checks import is_integer
from ...errors import LowRankError
from ...modules import check_model
from ..damping import Damping
from ..recovery.scoring import samples_of
from .find import Attention, Rotary, Weights, find_attentions, smaller_config_
from .problem import HeadProblem
from .rotary_pairs import choose_bands, common_frequency, energies, seen_means


@torch.no_grad()
def reduce_head_dim_(
    model: nn.Module,
    data: Iterable[Any],
    head_dim: int,
    *,
    context: int = 1024,
    damping: Damping | None = None,
    mask: MaskOf | None = None,
    progress: bool = False,
) -> nn.Module:
    """Makes the heads of a language model's attentions smaller, in place: queries, keys, values and what reads them.

    The result is an ordinary model of the same class with another ``head_dim`` in its configuration:
    ``save_pretrained`` writes a folder that ``from_pretrained`` reads without this library. Its cache and its attention
    become smaller with the heads, which low-rank projections do not bring. Attentions have to be those of a Llama, as
    in Mistral and Qwen2; others are refused.

    Where only parameters matter, low-rank layers are better for queries and keys, and this is better for values. With
    three quarters of the parameters of its value and output projections SmolLM2 has the perplexity 36.8 with smaller
    heads and 44.8 with layers in pivot form (dense: 34.9); with three quarters of those of queries and keys 42.5 and
    35.0.

    Values keep the entries of which the output projection says most, and a regression on ``data`` makes up for the
    others, as for the units of :func:`remove_units_`. Of queries and keys RoPE turns pairs of entries, each at its own
    frequency. Pairs of about the same frequency turn together, and a complex singular value decomposition leaves fewer
    of them; which, and how many, is the choice that loses least of what tells keys apart, alike in all layers. The
    frequencies stand in the configuration as the factors of LongRoPE. (MoDeGPT, Lin et al., 2025, has the values'
    decomposition, and keeps other pairs in each head, which no configuration can say.)

    Args:
        model: a trained model of transformers, without low-rank layers.
        data: the batches that :func:`calibrate` takes.
        head_dim: how many entries a head has then; an even number.
        context: the largest distance of two tokens that counts in the choice of frequencies. With a short one more
            pairs turn together, and more is left of them. SmolLM2 with 56 of 64 entries has perplexity 37.5 in windows
            of 512 tokens and 23.7 in one of 2,048 with 1024 (dense: 34.9 and 19.6), and 49.0 and 37.5 with 8192.
        damping: a ridge on the moments, by default ``Damping()``; that of gradients is not used.
        mask: what is padding in a batch, as in :func:`calibrate`.
        progress: shows a progress bar.

    Returns:
        The model.

    Raises:
        LowRankError: if the attentions are of another kind, the size is not an even number below the present one, or a
            batch is bad; the model is bit-identical then.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=2, **sizes))
        >>> tokens = torch.randint(100, (4, 32))
        >>> model = lr.reduce_head_dim_(model, [{"input_ids": tokens}], head_dim=12)
        >>> model.config.head_dim, model.model.layers[0].self_attn.k_proj
        (12, Linear(in_features=64, out_features=24, bias=False))
    """
    check_model(model)
    check_batches(data, "reduce_head_dim_")
    attentions, rotary = find_attentions(model)
    old = attentions[0].size
    if not is_integer(head_dim, 2) or head_dim % 2 or head_dim >= old:
        raise LowRankError(f"reduce_head_dim_: got head_dim={head_dim!r}, expected an even number below {old}.")
    if not is_integer(context, 1):
        raise LowRankError(f"reduce_head_dim_: got context={context!r}, expected a number of tokens.")
    batches = data if isinstance(data, (list, tuple)) else list(data)
    if not batches:
        raise LowRankError("reduce_head_dim_: got no batches in data.")
    sizes = _Sizes(model, attentions, rotary)
    sizes.check(first_sample(batches[0], samples_of(batches[0])), head_dim)
    names = {f"{each.name}.{key}" for each in attentions for key in ("k_proj", "o_proj")}
    stats = calibrate(model, batches, target=[lambda name, _: name in names], mask=mask, progress=progress)
    ridge, frequencies = (damping or Damping()).inputs, rotary.frequencies
    seen = seen_means(frequencies, context)
    problems = [
        HeadProblem.of(each, stats[f"{each.name}.k_proj"], stats[f"{each.name}.o_proj"], seen, ridge)
        for each in attentions
    ]
    queries, keys = torch.cat([each.queries for each in problems]), torch.cat([each.keys for each in problems])
    losses, bands = energies(queries, keys), choose_bands(queries, keys, frequencies, head_dim // 2, context)
    common = [common_frequency(frequencies[band.pairs], losses[band.pairs]).expand(band.rank) for band in bands]
    sizes.put_([each.weights(bands, head_dim) for each in problems], head_dim, torch.cat(common))
    return model


class _Sizes:
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

    def check(self, example: Any, size: int) -> None:
        """Raises if the model with some entries of its heads gives something else than with zeros for the others.

        Args:
            example: what the model is run on.
            size: how many entries stay.

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
                expected = self._run(example)
            with self._restored():
                parts = [_parts(attention, rows, entries, zeros=False) for attention in self._attentions]
                self.put_(parts, size, self._rotary.frequencies[pairs])
                found = self._run(example)
        except Exception as error:
            raise LowRankError(f"reduce_head_dim_: the model does not run with smaller heads ({error}).") from error
        tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
        if expected.shape != found.shape or not float((expected - found).abs().max()) <= tolerance:
            raise LowRankError(
                f"reduce_head_dim_: got a {type(self._model).__name__} that uses its heads in another way than a Llama,"
                " expected halves of queries and keys that RoPE turns with each other, and nothing else."
            )

    def _run(self, example: Any) -> Tensor:
        with quiet_eval(self._model):
            output = main_output(forward(self._model, example, with_target=False)[0])
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
