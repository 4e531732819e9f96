r"""Formulas as MathML, made while the site is built: browsers show it with no script or network.

`pymdownx.arithmatex` marks `\( ... \)` and `\[ ... \]`; what it marked is replaced here.
"""

import html
import re

import latex2mathml.converter

_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<formula>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(content, **kwargs):
    """Called by MkDocs with the HTML of each page."""
    del kwargs
    return _MARKED.sub(_as_mathml, content)


def _as_mathml(match):
    display = "block" if match["tag"] == "div" else "inline"
    formula = html.unescape(match["formula"]).strip()
    return latex2mathml.converter.convert(formula, display=display)
