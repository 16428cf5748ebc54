"""Formulas as MathML, which browsers draw by themselves: no script, no fonts from elsewhere."""

from typing import Any

from latex2mathml.converter import convert


def inline(source: str, language: str, css_class: str, md: Any) -> str:
    """The formula of `` `#!math ...` `` within a line."""
    return convert(source)


def block(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """The formula of a fence ``math``, centred."""
    return f'<div class="math">{convert(source, display="block")}</div>'
