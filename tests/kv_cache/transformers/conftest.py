"""Looking up LowRankCache makes transformers know the attention "lowrank"."""

import lowrank_layers as lr

lr.LowRankCache  # noqa: B018
