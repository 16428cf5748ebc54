"""Updates that keep the factors of a non-negative matrix non-negative."""

from .checks import (
    Loss as Loss,
    Stopping as Stopping,
    check_choice as check_choice,
    check_nonnegative as check_nonnegative,
)
from .products import DenseProducts as DenseProducts, SparseProducts as SparseProducts, products_of as products_of
from .updates import (
    Divergence as Divergence,
    LeastSquares as LeastSquares,
    Problem as Problem,
    Solver as Solver,
    weights_of as weights_of,
)
from .zeros import smallest as smallest, tiny as tiny
