"""Pure tensor functions under every factorization. fp64 where it decides the result."""

from .check import check_tensor, narrowed, working_dtype
from .products import fold, khatri_rao, mode_product, rounded_train, train_product, unfold
from .psd import Root, damp, psd_root
from .scale import scaled_to_unit, unit_scale
from .svd import exact_svd, gram_svd, leading_eigenvectors, randomized_svd

__all__ = [
    "Root",
    "check_tensor",
    "damp",
    "exact_svd",
    "fold",
    "gram_svd",
    "khatri_rao",
    "leading_eigenvectors",
    "mode_product",
    "narrowed",
    "psd_root",
    "randomized_svd",
    "rounded_train",
    "scaled_to_unit",
    "train_product",
    "unfold",
    "unit_scale",
    "working_dtype",
]
