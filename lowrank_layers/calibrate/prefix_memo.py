"""Forward passes of the same batches again and again, each from one stage of the model on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..memory import release_mapped
from .batch_masks import MaskOf
from .fisher import main_output
from .overridden import overridden
from .padding import Padding
from .run import forward, target_of
from .stages import find_stages


@dataclass
class KnownPass:
    """The pass of one batch through the model as it was.

    Args:
        batch: the batch.
        target: its target.
        output: what the model returned.
        mask: which positions of that are data; ``None`` where all are.
        calls: the names of the stages and what they returned, in the order of their calls.
    """

    batch: Any
    target: Any
    output: Any = None
    mask: Tensor | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)


class PrefixMemo:
    """Runs a model on batches from one of its stages on; stages before it return what they returned the first time.

    A context manager. Inside, every stage of the model looks whether its output is known. Between the stages the
    model's own code runs each time. Where a pass with all outputs remembered does not return what the first one did,
    because stages change their inputs in place, say, passes run from the start. Behind a stage, parameters in files are
    let go of.

    Args:
        model: the model, in eval mode; its layers may change once all batches were added.
        with_target: whether the last item of a tuple batch is the target.
        mask: how the padding of a batch is found.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with PrefixMemo(model, with_target=False, mask=None) as memo:
        ...     known = memo.add(torch.randn(3, 4))
        ...     _ = nn.init.zeros_(model[2].weight)
        ...     output = memo.rerun(known, "2")
        >>> torch.equal(output, model[2].bias.expand(3, 2))
        True
    """

    def __init__(self, model: nn.Module, *, with_target: bool, mask: MaskOf | None) -> None:
        self._model, self._with_target, self._padding = model, with_target, Padding(model, mask)
        self._stages = find_stages(model)
        self._own = {name: vars(model.get_submodule(name)).get("forward") for name in self._stages}
        self._now: KnownPass | None = None
        self._known = self._place = 0  # calls that are remembered, and that were made
        self._inside = False
        self._remembers = True
        self._undo = ExitStack()

    def __enter__(self) -> PrefixMemo:
        with ExitStack() as undo:
            for name in self._stages:
                module = self._model.get_submodule(name)
                undo.enter_context(overridden(module, partial(self._call, name, module.forward)))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def add(self, batch: Any) -> KnownPass:
        """Runs the model on a batch, and returns what is remembered of that.

        Args:
            batch: the batch.
        """
        target = target_of(batch) if self._with_target else None
        new = KnownPass(batch, target)
        with self._padding as padding:
            padding.start(batch, target)
            new.output = tree_map(_copied, self._run(new, 0))
            new.mask = padding.of_output(main_output(new.output))
        self._remembers = self._remembers and self._is_the_same(new)
        return new

    def rerun(self, known: KnownPass, layer: str) -> Any:
        """Returns the output of the model as it is now, of which only what lies from a layer on may have changed.

        Args:
            known: the pass of a batch.
            layer: the first layer that has changed.
        """
        stage = self.stage_around([layer])
        first = next((place for place, (name, _) in enumerate(known.calls) if name == stage), 0)
        return self._run(known, first if self._remembers else 0)

    def stage_around(self, layers: Collection[str]) -> str | None:
        """Returns the stage that some layers are or lie in, if there is one of all of them.

        Args:
            layers: names of layers.
        """
        around = (
            name for name in self._stages if all(f"{each}.".startswith(f"{name}." if name else "") for each in layers)
        )
        return next(around, None)

    @contextmanager
    def own_forward(self, name: str) -> Iterator[None]:
        """Lets one layer compute what it does by itself, inside.

        Args:
            name: the layer, which may be a stage or lie in one.
        """
        if name not in self._own:
            yield
            return
        with overridden(self._model.get_submodule(name), self._own[name]):
            yield

    def _is_the_same(self, known: KnownPass) -> bool:
        """Whether the last stage alone, after all others have been remembered, returns what the first pass did."""
        found, before = (main_output(output) for output in (self._run(known, len(known.calls) - 1), known.output))
        if found is None or before is None or found.shape != before.shape:
            return False
        tolerance = 1e-3 * float(before.abs().max()) if before.numel() else 0.0
        return torch.allclose(found.double(), before.double(), rtol=0, atol=tolerance, equal_nan=True)

    @torch.no_grad()
    def _run(self, started: KnownPass, known: int) -> Any:
        self._now, self._known, self._place = started, known, 0
        try:
            return forward(self._model, started.batch, with_target=self._with_target)[0]
        finally:
            self._now = None

    def _call(self, name: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a stage does in the place of its own forward; a call inside another one is a part of that."""
        if self._now is None or self._inside:
            return own(*args, **kwargs)
        place, calls = self._place, self._now.calls
        self._place += 1
        if place < self._known and calls[place][0] == name:
            return tree_map(_copied, calls[place][1])
        self._inside = True
        try:
            output = own(*args, **kwargs)
        finally:
            self._inside = False
            release_mapped(self._model.get_submodule(name).parameters())
        if place == len(calls):
            calls.append((name, tree_map(_copied, output)))
        return output


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
