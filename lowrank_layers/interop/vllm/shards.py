"""The layers of a model that vLLM computes as one, and what of them one process of tensor parallelism holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import LowRankError
from ...layers.config import FactoredSpec


@dataclass(frozen=True)
class Shard:
    """One layer of the model inside a layer of vLLM.

    Args:
        name: its name in the model.
        key: what vLLM calls it where it loads weights: ``"q"``, ``"k"``, ``"v"``, a number, or ``None`` if it is alone.
        spec: what it is; ``None`` for a dense layer.
    """

    name: str
    key: str | int | None
    spec: FactoredSpec | None

    @property
    def has_pivots(self) -> bool:
        """Whether it is in pivot form."""
        return self.spec is not None and self.spec.type == "PivotLinear"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer of vLLM and of its part in one process.

    Args:
        inputs: its inputs.
        local_inputs: those that this process is given; fewer for a layer that is split along its inputs.
        outputs: the outputs of each shard in this process.
        splits: the number of processes among which the outputs are split.
        replicas: the number of processes that hold the same outputs of each shard, as those of few key and value heads
            do.
    """

    inputs: int
    local_inputs: int
    outputs: tuple[int, ...]
    splits: int
    replicas: tuple[int, ...]

    @classmethod
    def of(
        cls, layer: Any, shards: int, local_inputs: int, local_outputs: list[int], inputs: int, outputs: int
    ) -> Sizes:
        """Reads them off a layer.

        Args:
            layer: the layer of vLLM.
            shards: the number of layers of the model in it.
            local_inputs: as vLLM says them.
            local_outputs: as vLLM says them, one per shard; one layer of the model may have several.
            inputs: as vLLM says them.
            outputs: as vLLM says them, with replicas.

        Raises:
            LowRankError: for a layer with one weight for several projections, split over processes.
        """
        copies = getattr(layer, "num_kv_head_replicas", 1)
        replicas = (1, copies, copies) if len(local_outputs) == 3 and copies > 1 else (1,) * len(local_outputs)
        if shards == 1:
            if len(local_outputs) > 1 and outputs != sum(local_outputs):
                raise LowRankError(
                    f"vLLM: got tensor parallelism over {outputs // sum(local_outputs)} processes for a model with"
                    f" one weight for {len(local_outputs)} projections, whose factors are not split; serve it in one."
                )
            local_outputs, replicas = [sum(local_outputs)], (1,)
        return cls(inputs, local_inputs, tuple(local_outputs), outputs // sum(local_outputs), replicas)

    @property
    def splits_inputs(self) -> bool:
        """Whether each process has a part of the inputs."""
        return self.local_inputs < self.inputs

    def own_rows(self, index: int, rank: int) -> slice:
        """Returns the outputs of a shard, among all of them, that a process has.

        Args:
            index: the index of the shard.
            rank: the rank of the process.
        """
        size = self.outputs[index]
        start = (rank // self.replicas[index]) * size if self.splits > 1 else 0
        return slice(start, start + size)

    def all_rows(self, index: int) -> int:
        """Returns the number of outputs of a shard in all processes.

        Args:
            index: the index of the shard.
        """
        return self.outputs[index] * self.splits // self.replicas[index]

    def own_columns(self, rank: int) -> slice:
        """Returns the inputs, among all of them, that a process has.

        Args:
            rank: the rank of the process.
        """
        start = rank * self.local_inputs if self.splits_inputs else 0
        return slice(start, start + self.local_inputs)
