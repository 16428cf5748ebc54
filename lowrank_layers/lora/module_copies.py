"""The copies of a module that adapters train whole, and which of them is in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import named_tensors
from .learning import let_learn_

_ACTIVE = "active"
COPIES = "lora_whole"
"""Name of the child module that holds the copies of a module: ``head.lora_whole.default.weight``."""


class Copies(nn.ModuleDict):
    """The copies of one module by the names of adapters; ``active`` names the one in use, ``None`` the module itself.

    The state dict holds the choice too: a one for the copy in use, zeros for the others, in the order of their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.rows: list[str | None] | None = None  # one name per row of a batch
        self.disabled = False
        self.untouched: list[str] = []  # prefixes of the copies that the state dict loaded last does not mention

    def choose(self, names: Iterable[str]) -> None:
        """Uses the copy of the first of these adapters that has one; only that copy learns."""
        self.active = next((name for name in names if name in self), None)
        for name, own in self.items():
            let_learn_(own, name == self.active)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None, "disabled": False, "active": None if self.disabled else self.active}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        active = None if self.disabled else self.active
        destination[prefix + _ACTIVE] = torch.tensor([float(name == active) for name in sorted(self)])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        others = {key: value for key, value in state_dict.items() if key != prefix + _ACTIVE}
        super()._load_from_state_dict(others, prefix, *args)
        mentioned = sorted({key.removeprefix(prefix).split(".")[0] for key in others if key.startswith(prefix)})
        self.untouched = [f"{prefix}{name}." for name in self if name not in mentioned]
        flags = state_dict.get(prefix + _ACTIVE)
        if flags is None and mentioned:
            args[2].append(prefix + _ACTIVE)  # the missing keys
        elif flags is not None:
            self.choose([name for name, flag in zip(mentioned, flags.tolist(), strict=False) if flag])


def copies_in(module: nn.Module) -> Copies | None:
    """The copies of a module itself, or ``None``."""
    copies = module._modules.get(COPIES)
    return copies if isinstance(copies, Copies) else None


def copies_of(model: nn.Module) -> dict[str, Copies]:
    """The copies of every module that is trained whole, by the module's name."""
    return {name.rpartition(".")[0]: each for name, each in model.named_modules() if isinstance(each, Copies)}


def trained_whole_by(model: nn.Module, names: Iterable[str]) -> tuple[str, list[str]] | None:
    """A module that several of the adapters train whole, and these adapters; ``None`` where there is none."""
    wanted = list(names)
    for owner, copies in copies_of(model).items():
        several = [name for name in wanted if name in copies]
        if len(several) > 1:
            return owner, several
    return None


def copied_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters and buffers of an adapter's copies, by their names in the base."""
    found: dict[str, Tensor] = {}
    for owner, copies in copies_of(model).items():
        if name in copies:
            found |= {f"{owner}.{key}": tensor for key, tensor in named_tensors(copies[name]).items()}
    return found
