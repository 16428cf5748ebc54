"""Pictures of spectra, decompositions, plans, accuracies, losses and caches.

They need matplotlib, which the extra ``plot`` installs. Each function returns the figure and never shows it. Hues are
those of Okabe and Ito (2008), readable without colour vision; everything else follows matplotlib's style, so that
``with matplotlib.pyplot.style.context("dark_background"):`` draws in the dark.
"""

from ..drawing import panels as panels, save_figure as save_figure
from ..spectrum import monitor_curves as monitor_curves
from .against_rank import error_against_rank as error_against_rank, stability_against_rank as stability_against_rank
from .components import cp_factors as cp_factors, nmf_factors as nmf_factors
from .curves import (
    accuracy_against_size as accuracy_against_size,
    loss_against_wire_bytes as loss_against_wire_bytes,
    losses as losses,
    perplexity_against_bytes as perplexity_against_bytes,
)
from .histories import progression as progression, recovery as recovery
from .images import approximation as approximation, image_strip as image_strip
from .scatter import tensor_scatter as tensor_scatter
from .sizes import plan as plan, size_score_front as size_score_front
from .spectrum import singular_values as singular_values, spectra as spectra
