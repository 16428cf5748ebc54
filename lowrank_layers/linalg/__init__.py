"""Pure tensor functions on which the factorizations build, in fp64 where precision decides the result."""

from .check import (
    check_tensor as check_tensor,
    is_finite as is_finite,
    narrowed as narrowed,
    working_dtype as working_dtype,
)
from .half_products import (
    half_products_in_fp32 as half_products_in_fp32,
    halves_are_slow as halves_are_slow,
    in_fp32 as in_fp32,
)
from .krylov import krylov_svd as krylov_svd
from .pivots import pivot_rows as pivot_rows
from .precision import full_precision as full_precision
from .products import (
    fold as fold,
    khatri_rao as khatri_rao,
    mode_product as mode_product,
    rounded_train as rounded_train,
    train_product as train_product,
    unfold as unfold,
)
from .psd import (
    LowRankRoot as LowRankRoot,
    Root as Root,
    damp as damp,
    low_rank_root as low_rank_root,
    psd_root as psd_root,
)
from .scale import scaled_to_unit as scaled_to_unit, to_unit as to_unit, unit_scale as unit_scale
from .sparse import (
    Matrix as Matrix,
    ScipySparse as ScipySparse,
    SparseMatrix as SparseMatrix,
    check_matrix as check_matrix,
    is_dense as is_dense,
)
from .svd import (
    exact_svd as exact_svd,
    gram_svd as gram_svd,
    leading_eigenvectors as leading_eigenvectors,
    leading_svd as leading_svd,
    randomized_svd as randomized_svd,
)
