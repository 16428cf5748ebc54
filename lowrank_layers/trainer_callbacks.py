"""Callbacks for the trainers of transformers and Lightning, which are imported when a callback is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .errors import MissingExtraError

Begin = Callable[[int], object]
"""Called when training begins, with the number of steps done before: above 0 when training is resumed."""
End = Callable[[], object]
"""Called when training ends."""


def hf_callback(begin: Begin, end: End) -> Any:
    """Returns a ``transformers.TrainerCallback``.

    Args:
        begin: called with ``state.global_step``.
        end: called at the end.

    Raises:
        MissingExtraError: if transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", None):
            raise
        raise MissingExtraError(
            'to_hf_callback needs transformers: pip install "lowrank-layers[transformers]".'
        ) from error

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            end()

    return Callback()


def lightning_callback(begin: Begin, end: End) -> Any:
    """Returns a callback of the package ``lightning``, or else ``pytorch_lightning``.

    Args:
        begin: called with ``trainer.global_step``.
        end: called at the end, and when training fails.

    Raises:
        MissingExtraError: if neither is installed.
    """

    def on_train_start(self: Any, trainer: Any, pl_module: Any) -> None:
        begin(trainer.global_step)

    def on_train_end(self: Any, trainer: Any, pl_module: Any) -> None:
        end()

    def on_exception(self: Any, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        end()

    methods = {"on_train_start": on_train_start, "on_train_end": on_train_end, "on_exception": on_exception}
    return type("TrainingCallback", (_lightning().Callback,), methods)()


def _lightning() -> Any:
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name not in (package, package.partition(".")[0]):
                raise
    raise MissingExtraError("to_lightning_callback: Lightning is not installed: pip install lightning.")
