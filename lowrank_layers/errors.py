"""Exceptions. Each message says what was got, what was expected and what to do."""


class LowRankError(ValueError):
    """Base class of the exceptions of this library, for arguments that cannot be used.

    Examples:
        >>> import torch, lowrank_layers as lr
        >>> try:
        ...     lr.svd(torch.eye(3), rank=0)
        ... except lr.LowRankError as error:
        ...     print(error)
        svd: got rank 0, expected an integer of at least 1 or a rank rule such as Energy(0.95).
    """


class UnsupportedLayerError(LowRankError):
    """A layer has a type or a setting that the requested low-rank form does not support."""


class BudgetError(LowRankError):
    """No choice of methods and ranks meets the budget."""


class CheckpointError(LowRankError):
    """A file is damaged, of another format, or made for another model."""


class MissingExtraError(LowRankError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""
