"""A model whose parameters are mapped from the files of a checkpoint: it takes memory only where it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import CheckpointError, LowRankError
from ..memory import map_parameter
from ..modules import check_can_be_filled, check_model, tied_names
from .tensor_files import Checkpoint


@contextmanager
def without_values() -> Iterator[None]:
    """Builds modules inside whose parameters are on the meta device, and whose buffers have their values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            kept = vars(parameter)
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            vars(module._parameters[name]).update(kept)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill_from_files_(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Gives a model without values those of a checkpoint, which stay in its files until they are looked at.

    Args:
        model: a model with all parameters on the meta device; changed in place.
        checkpoint: its weights, under the names of its state dict. Of tied ones one name is enough.

    Raises:
        CheckpointError: for names or shapes that do not fit, before anything is changed.
    """
    check_model(model)
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    real = [name for name, tensor in state.items() if isinstance(tensor, nn.Parameter) and not tensor.is_meta]
    if real:
        raise LowRankError(
            f"{real[0]!r} has values; build the model on the meta device: with torch.device('meta'): Model(...), and"
            " its buffers outside of it."
        )
    source = {name: name for name in state if name in checkpoint}
    for names in tied_names(state).values():
        known = [name for name in names if name in checkpoint]
        source |= {name: known[0] for name in names if known}
    missing = [name for name in state if name not in source]
    unknown = [name for name in checkpoint if name not in state]
    shapes = [name for name in source if tuple(state[name].shape) != checkpoint[source[name]].shape]
    problems = [f"missing {name!r}" for name in missing] + [f"unknown {name!r}" for name in unknown]
    problems += [f"{name!r} of another shape" for name in shapes]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{checkpoint.path}: does not fit the model: {'; '.join(problems[:5])}{more}.")
    check_can_be_filled(model, state, checkpoint.path)
    made: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, parameter in list(module._parameters.items()):
            name = f"{prefix}.{key}" if prefix else key
            if parameter is not None:
                first = source[name]
                if first not in made:
                    made[first] = map_parameter(checkpoint.read(first))
                module._parameters[key] = made[first]
        for key, buffer in list(module._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            if buffer is not None and name in source:
                module._buffers[key] = checkpoint.read(source[name]).clone()
    return model
