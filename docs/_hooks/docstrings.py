"""Docstrings are written as Keras writes them; mkdocstrings knows some headings by other names."""

import re

import griffe

# Under `Example:` it would take code for text.
_EXAMPLE = re.compile(r"^(\s*)Example:\n", re.MULTILINE)


class KerasHeadings(griffe.Extension):
    """Extension of the reader of docstrings."""

    def on_instance(self, *, obj, **kwargs):
        """Called with each module, class and function."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:\n", obj.docstring.value)
