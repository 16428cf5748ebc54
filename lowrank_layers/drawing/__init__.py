"""How all pictures are drawn: figures, their axes, colours, legends and ticks."""

from .figure import (
    SIGNED as SIGNED,
    colour as colour,
    figure_of as figure_of,
    given_or_new as given_or_new,
    ink as ink,
    legend as legend,
    panels as panels,
    row as row,
    save_figure as save_figure,
)
from .ticks import few_x as few_x, logarithmic as logarithmic, whole_x as whole_x
