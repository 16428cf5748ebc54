"""The layers of a model that vLLM computes as one, and what of them one process of tensor parallelism holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from ...errors import CheckpointError, LowRankError
from ...layers.config import FactoredSpec, Spec


@dataclass(frozen=True)
class Shard:
    """One layer of the model inside a layer of vLLM.

    Args:
        name: its name in the model.
        key: what vLLM calls it where it loads weights: ``"q"``, ``"k"``, ``"v"``, a number, or ``None`` if it is alone.
        spec: what it is; ``None`` for a dense layer.
        resized: the settings of the dense layer, where its sizes are others than the model's configuration says.
    """

    name: str
    key: str | int | None
    spec: FactoredSpec | None
    resized: Spec | None = None

    @property
    def has_pivots(self) -> bool:
        """Whether it is in pivot form."""
        return self.spec is not None and self.spec.type == "PivotLinear"

    @property
    def has_bias(self) -> bool:
        """Whether it is known to have a bias; that of a dense layer which is not resized is vLLM's alone."""
        if self.spec is not None:
            return self.spec.bias
        return self.resized is not None and bool(self.resized.get("bias", True))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer of vLLM and of its part in one process.

    Resized layers may have numbers of inputs or outputs that the number of processes does not divide. Each process has
    as many as the first one then, and what the last ones have too many of is zero.

    Args:
        inputs: its inputs.
        local_inputs: the number that this process is given; fewer for a layer that is split along its inputs.
        input_splits: the number of processes among which the inputs are split.
        outputs: the outputs of each shard in this process.
        all_outputs: those of each shard in all processes.
        splits: the number of processes among which the outputs are split.
        replicas: the number of processes that hold the same outputs of each shard, as those of few key and value heads
            do.
    """

    inputs: int
    local_inputs: int
    input_splits: int
    outputs: tuple[int, ...]
    all_outputs: tuple[int, ...]
    splits: int
    replicas: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layer: Any,
        shards: Sequence[Shard],
        local_inputs: int,
        local_outputs: list[int],
        inputs: int,
        outputs: int,
    ) -> Sizes:
        """Reads them off a layer of vLLM, and off the layers of the model where these are resized.

        Args:
            layer: the layer of vLLM.
            shards: the layers of the model in it.
            local_inputs: as vLLM says them.
            local_outputs: as vLLM says them, one per shard; one layer of the model may have several.
            inputs: as vLLM says them.
            outputs: as vLLM says them, with replicas.

        Raises:
            LowRankError: for a layer with one weight for several projections, split over processes.
            CheckpointError: if layers that vLLM computes as one are resized to different sizes.
        """
        copies = getattr(layer, "num_kv_head_replicas", 1)
        replicas = (1, copies, copies) if len(local_outputs) == 3 and copies > 1 else (1,) * len(local_outputs)
        if len(shards) == 1:
            if len(local_outputs) > 1 and outputs != sum(local_outputs):
                raise LowRankError(
                    f"vLLM: got tensor parallelism over {outputs // sum(local_outputs)} processes for a model with"
                    f" one weight for {len(local_outputs)} projections, whose factors are not split; serve it in one."
                )
            local_outputs, replicas = [sum(local_outputs)], (1,)
        splits, input_splits = outputs // sum(local_outputs), inputs // local_inputs
        if any(shard.resized is not None for shard in shards):
            inputs, size = _resized(shards)
            local_inputs, local_outputs = ceil(inputs / input_splits), [ceil(size / splits)] * len(shards)
            all_outputs = [size] * len(shards)
        else:
            all_outputs = [own * splits // copies for own, copies in zip(local_outputs, replicas, strict=True)]
        return cls(inputs, local_inputs, input_splits, tuple(local_outputs), tuple(all_outputs), splits, replicas)

    @property
    def splits_inputs(self) -> bool:
        """Whether each process has a part of the inputs."""
        return self.input_splits > 1

    def own_rows(self, index: int, rank: int) -> slice:
        """Returns the outputs of a shard, among all of them, that a process has.

        Args:
            index: the index of the shard.
            rank: the rank of the process.
        """
        size = self.outputs[index]
        start = (rank // self.replicas[index]) * size if self.splits > 1 else 0
        return slice(start, start + size)

    def own_columns(self, rank: int) -> slice:
        """Returns the inputs, among all of them, that a process has.

        Args:
            rank: the rank of the process.
        """
        start = rank * self.local_inputs if self.splits_inputs else 0
        return slice(start, start + self.local_inputs)


def _resized(shards: Sequence[Shard]) -> tuple[int, int]:
    """The numbers of inputs and outputs of each of the layers, which have to be the same."""
    sizes = [None if (own := each.resized) is None else (own["in_features"], own["out_features"]) for each in shards]
    first = sizes[0]
    if len(set(sizes)) > 1 or first is None:
        words = [
            f"{each.name!r} {'as configured' if size is None else size}"
            for each, size in zip(shards, sizes, strict=True)
        ]
        raise CheckpointError(
            f"config.json: vLLM computes layers as one that have different sizes (inputs, outputs): {', '.join(words)},"
            " expected the same for all; save the model again."
        )
    return first
