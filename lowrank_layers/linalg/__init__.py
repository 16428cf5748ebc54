"""Pure tensor functions under every factorization. fp64 where it decides the result."""

from .check import check_tensor, narrowed, working_dtype
from .krylov import krylov_svd
from .precision import full_precision
from .products import fold, khatri_rao, mode_product, rounded_train, train_product, unfold
from .psd import Root, damp, psd_root
from .scale import scaled_to_unit, to_unit, unit_scale
from .sparse import Matrix, ScipySparse, SparseMatrix, check_matrix, is_dense
from .svd import exact_svd, gram_svd, leading_eigenvectors, randomized_svd

__all__ = [
    "Matrix",
    "Root",
    "ScipySparse",
    "SparseMatrix",
    "check_matrix",
    "check_tensor",
    "damp",
    "exact_svd",
    "fold",
    "full_precision",
    "gram_svd",
    "is_dense",
    "khatri_rao",
    "krylov_svd",
    "leading_eigenvectors",
    "mode_product",
    "narrowed",
    "psd_root",
    "randomized_svd",
    "rounded_train",
    "scaled_to_unit",
    "to_unit",
    "train_product",
    "unfold",
    "unit_scale",
    "working_dtype",
]
