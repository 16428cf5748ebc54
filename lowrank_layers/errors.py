"""The errors of this library: each says what was got, what was expected and what to do."""


class LowRankError(ValueError):
    """Anything that lowrank_layers refuses to do.

    Examples:
        >>> import torch, lowrank_layers as lr
        >>> try:
        ...     lr.svd(torch.eye(3), rank=0)
        ... except lr.LowRankError as error:
        ...     print(error)
        svd: got rank 0, expected an integer of at least 1 or a rank rule such as Energy(0.95).
    """


class UnsupportedLayerError(LowRankError):
    """A layer has a setting that its low-rank form cannot honour."""


class BudgetError(LowRankError):
    """No choice of ranks fits into the budget."""


class CheckpointError(LowRankError):
    """A file is torn, foreign, or made for another model."""


class MissingExtraError(LowRankError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
