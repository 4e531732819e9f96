"""Docstrings are written as Keras writes them; mkdocstrings knows the parts by other forms."""

import re

import griffe

_EXAMPLE = re.compile(r"^( *)Example:\n((?:.*\S.*\n?|\n(?=\1 +\S))+)", re.MULTILINE)


class KerasHeadings(griffe.Extension):
    """Extension of the reader of docstrings."""

    def on_instance(self, *, obj, **kwargs):
        """Called with each module, class and function."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(_as_examples, obj.docstring.value)


def _as_examples(match):
    """A section `Examples:`, whose code is indented; under `Example:` code is taken for text."""
    indentation, block = match.groups()
    if not block.startswith(f"{indentation} "):
        block = re.sub(r"^(?=.*\S)", "    ", block, flags=re.MULTILINE)
    return f"{indentation}Examples:\n{block}"
