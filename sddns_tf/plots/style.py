"""Colors, fonts and sizes that all pictures share, and how to save a figure."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

import pathlib
import textwrap

from sddns_tf import files

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
# Okabe and Ito's yellow is left out: a thin yellow line cannot be seen on white.
LINE_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")


def save(figure: Any, path: str | os.PathLike) -> pathlib.Path:
    """Write a figure to a file, completely or not at all.

    The picture is written beside its destination and renamed when complete, so an interrupted
    run leaves an earlier file as it was. Missing folders are created.

    Args:
        figure: A `matplotlib.figure.Figure`.
        path: Where to write. The suffix gives the format: `.png`, `.pdf`, `.svg`, ...

    Returns:
        The path as a `pathlib.Path`.

    Raises:
        ValueError: if the suffix is not a format that matplotlib writes.

    Example:
    >>> sddns_tf.plots.save(sddns_tf.plots.training_curves(history.history), "curves.png")
    """
    path = pathlib.Path(path)
    file_format = path.suffix[1:].lower()
    formats = sorted(figure.canvas.get_supported_filetypes())
    if file_format not in formats:
        raise ValueError(
            f"`path` must end in one of {', '.join('.' + name for name in formats)}. "
            f"Received: {str(path)!r}."
        )
    with files.replacing(path) as unfinished:
        figure.savefig(unfinished, format=file_format, dpi="figure")
    return path


def figure_of(width: float, height: float) -> Figure:
    """Return an empty figure, given its width and height in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need the package `matplotlib`: `pip install sddns_tf[plots]`."
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Return the color and dashes of the line at an index."""
    style = LINE_STYLES[index // len(LINE_COLORS) % len(LINE_STYLES)]
    return {"color": LINE_COLORS[index % len(LINE_COLORS)], "linestyle": style}


def wrapped(text: str, width: int) -> str:
    """Return a text wrapped to lines of at most `width` characters."""
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, width))
