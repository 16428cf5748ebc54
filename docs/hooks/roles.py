"""The docstrings as Markdown, for mkdocstrings, which loads this file."""

from typing import Any

import griffe
from names import without_roles


class Roles(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once per module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = without_roles(obj.docstring.value)
