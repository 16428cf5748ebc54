"""The layers that a run has made, each in a file, so that a run that was killed does not make them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..calibrate.processes import Processes
from ..compress.sequential import Seen
from ..files import read_header, read_tensor, write_tensors
from ..layers import FactoredModule
from ..layers.config import FactoredSpec, blank, describe
from ..memory import map_parameter, release_freed, release_mapped

_KEY = "lowrank_layers.layer"


class LayerStore:
    """Keeps layers in a folder, and in memory only where they are looked at.

    Args:
        folder: where the files are.
        model: the dense model.
        processes: those that all call this, of which the first one makes the layers.
    """

    def __init__(self, folder: Path, model: nn.Module, processes: Processes) -> None:
        self._folder, self._model, self._processes = folder, model, processes

    def keep(self, name: str, look: Callable[[], Seen], make: Callable[[Seen], nn.Module]) -> nn.Module:
        """Returns a layer with the values of its file, which is written first where it is not there.

        Args:
            name: the layer.
            look: finds what is known of it.
            make: makes it of that.
        """
        path, dense = self._folder / f"{name}.safetensors", self._model.get_submodule(name)

        def write() -> None:
            new = make(seen)
            kind = FactoredSpec.of(new).to_json() if isinstance(new, FactoredModule) else None
            tensors = {key: tensor.detach().contiguous() for key, tensor in new.state_dict().items()}
            write_tensors(path, tensors, _KEY, {"factored": kind, "dense": describe(dense)})

        if not self._processes.from_first(path.is_file):
            release_freed()
            seen = look()
            release_freed()
            self._processes.from_first(write)
            release_mapped(dense.parameters())
        return self._read(path)

    def _read(self, path: Path) -> nn.Module:
        header, infos = read_header(path, _KEY, "is no layer of a compression.")
        layer = blank(header["dense"])
        if header["factored"] is not None:
            layer = FactoredSpec.from_json(header["factored"]).like(layer)
        for name in infos:
            owner, _, key = name.rpartition(".")
            module, tensor = layer.get_submodule(owner), read_tensor(path, name)
            if key in module._buffers:
                module._buffers[key] = tensor.clone()
            else:
                module._parameters[key] = map_parameter(tensor)
        return layer.requires_grad_(False).eval()
