"""Callbacks for the trainers of transformers and Lightning, which are imported when a callback is made."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import MissingExtraError

Begin = Callable[[int], object]
"""Called when training begins, with the number of steps done before: above 0 when training is resumed."""
Act = Callable[[], object]
"""Called at the end of training, or after a step."""
InFolder = Callable[[Path], object]
"""Called with the folder of a checkpoint."""


def hf_callback(
    begin: Begin | None = None,
    end: Act | None = None,
    *,
    step: Act | None = None,
    save: InFolder | None = None,
    resume: InFolder | None = None,
) -> Any:
    """Returns a ``transformers.TrainerCallback``.

    Args:
        begin: called with ``state.global_step``.
        end: called at the end.
        step: called after every step of the optimizer, while the gradients are there.
        save: called in the main process with every checkpoint that was written.
        resume: called with the checkpoint from which training is resumed, and with the best one if its model is loaded
            at the end.

    Raises:
        MissingExtraError: if transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", None):
            raise
        raise MissingExtraError(
            'A callback for Trainer needs transformers: pip install "lowrank-layers[transformers]".'
        ) from error

    def checkpoint(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if begin is not None:
                begin(state.global_step)
            if resume is not None and state.global_step > 0:
                resume(checkpoint(args, state))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if step is not None:
                step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if save is not None and state.is_world_process_zero:
                save(checkpoint(args, state))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if resume is not None and args.load_best_model_at_end and state.best_model_checkpoint:
                resume(Path(state.best_model_checkpoint))
            if end is not None:
                end()

    return Callback()


def lightning_callback(begin: Begin, end: Act) -> Any:
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
