"""Charts as inline SVG, sized for a phone and colored by the page's style sheet.

The page follows the reader's light or dark mode, so charts cannot have fixed colors. Every mark
has a class (`s0`, `s1`, ... for series, `ink`, `faint`), and the style sheet sets its color.
"""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 40
SERIES = 7  # number of colors in the style sheet
_DASHES = ("", "6 3", "2 2", "8 3 2 3")


def histograms(
    normal: np.ndarray, other: np.ndarray, index: int, threshold: float, limits: tuple[float, float]
) -> str:
    """Draw histograms of two sets of scores, each scaled to its own peak, and the threshold.

    Args:
        normal: Scores of in-distribution images, `(N,)`.
        other: Scores of another set, `(M,)`.
        index: Number of that set's series; the normal images are series 0.
        threshold: Score above which images are flagged.
        limits: `(low, high)` of the axis; scores outside are counted in the outermost bins.

    Returns:
        SVG text.
    """
    edges = np.linspace(*limits, 49)
    frame = _Frame(limits, (0.0, 1.05), "OOD score", "", _ticks(*limits), [])
    for series, scores in ((0, normal), (index, other)):
        counts, _ = np.histogram(np.clip(scores, *limits), edges)
        heights = np.repeat(counts / counts.max(), 2)
        steps = np.repeat(edges, 2)[1:-1]
        x, y = np.r_[steps[0], steps, steps[-1]], np.r_[0.0, heights, 0.0]
        frame.add(f'<path class="area s{series % SERIES}" d="{frame.path(x, y)}Z"/>')
    if limits[0] <= threshold <= limits[1]:
        line = frame.path([threshold, threshold], [0.0, 1.05])
        frame.add(f'<path class="ink" stroke-dasharray="4 3" d="{line}"/>')
    return frame.svg("Histograms of the scores")


def roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Draw ROC curves, given the shares of normal and OOD images flagged for each series."""
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    frame = _Frame((0, 1), (0, 1), "normal images flagged", "OOD images flagged", ticks, ticks)
    frame.add(f'<path class="faint" d="{frame.path([0, 1], [0, 1])}"/>')
    for index, (x, y) in curves.items():
        frame.add(f'<path class="{_class(index)}" {_dash(index)} d="{frame.path(x, y)}"/>')
    return frame.svg("ROC curves")


def calibration(
    promised: np.ndarray, measured: np.ndarray, low: np.ndarray, high: np.ndarray
) -> str:
    """Draw the measured against the promised false positive rate, and a band for chance."""
    first = min(promised[0], 0.1)
    ticks = [t for t in (0.0001, 0.001, 0.01, 0.1, 1.0) if t >= first * 0.99]
    limits = (np.log10(first), 0.0)
    frame = _Frame(
        limits, limits, "promised rate", "normal images flagged", np.log10(ticks), np.log10(ticks),
        labels=[f"{tick:g}" for tick in ticks],
    )  # fmt: skip

    def log(values):
        return np.log10(np.clip(values, first, 1.0))

    x = log(promised)
    band = frame.path(np.r_[x, x[::-1]], np.r_[log(low), log(high)[::-1]])
    frame.add(f'<path class="band" d="{band}Z"/>')
    frame.add(f'<path class="faint" d="{frame.path(limits, limits)}"/>')
    frame.add(f'<path class="line s0" d="{frame.path(x, log(measured))}"/>')
    return frame.svg("Promised and measured false positive rate")


def scatter(points: Mapping[str, np.ndarray]) -> str:
    """Draw points, given as a dict from a name to an array `(n, 2)`."""
    everything = np.concatenate(list(points.values()))
    low, high = np.quantile(everything, [0.002, 0.998], axis=0)
    margin = 0.05 * (high - low) + 1e-9
    limits = np.stack([low - margin, high + margin], axis=1)
    frame = _Frame(limits[0], limits[1], "first component", "second component", [], [])
    for index, values in enumerate(points.values()):
        shown = np.clip(values, limits[:, 0], limits[:, 1])
        marks = "".join(_mark(index, *frame.place(*point)) for point in shown)
        frame.add(f'<g class="point s{index % SERIES}">{marks}</g>')
    return frame.svg("Map of the features")


def key(index: int, kind: str) -> str:
    """Draw the mark of a series for a legend; `kind` is `"line"`, `"area"` or `"point"`."""
    marks = {
        "line": f'<path class="{_class(index)}" {_dash(index)} d="M1 6H25"/>',
        "area": f'<rect class="area s{index % SERIES}" x="6" y="1" width="14" height="10"/>',
        "point": f'<g class="point s{index % SERIES}" transform="translate(13 6) scale(1.8)">'
        f"{_mark(index, 0, 0)}</g>",
    }
    return f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true">{marks[kind]}</svg>'


class _Frame:
    """Axes and the marks drawn between them."""

    def __init__(self, x_limits, y_limits, x_label, y_label, x_ticks, y_ticks, labels=None):
        self.limits = x_limits, y_limits
        self.parts = []
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        self.add(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        for index, tick in enumerate(x_ticks):
            x, _ = self.place(tick, y_limits[0])
            label = labels[index] if labels else f"{tick:g}"
            self.add(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
            self.add(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>')
        for index, tick in enumerate(y_ticks):
            _, y = self.place(x_limits[0], tick)
            label = labels[index] if labels else f"{tick:g}"
            self.add(f'<path class="axis" d="M{_LEFT} {y:.1f}h-4"/>')
            self.add(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
        middle = (_LEFT + right) / 2
        self.add(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{x_label}</text>')
        if y_label:
            y = (_TOP + bottom) / 2
            self.add(
                f'<text transform="translate(11 {y}) rotate(-90)" text-anchor="middle">'
                f"{y_label}</text>"
            )

    def add(self, part):
        """Add an SVG element on top."""
        self.parts.append(part)

    def place(self, x, y):
        """Return the position of a point in the picture."""
        (x_low, x_high), (y_low, y_high) = self.limits
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM),
        )

    def path(self, x, y):
        """Return the `d` attribute of a path through points."""
        x, y = self.place(np.asarray(x, float), np.asarray(y, float))
        return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))

    def svg(self, title):
        """Return the complete SVG."""
        return _svg(title, "".join(self.parts), HEIGHT)


def _svg(title, inside, height):
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(title)}">{inside}</svg>'
    )


def _ticks(low, high):
    """Return a few round numbers between two limits."""
    raw = (high - low) / 5
    magnitude = 10.0 ** np.floor(np.log10(raw))
    step = magnitude * min((1, 2, 5, 10), key=lambda multiple: abs(multiple * magnitude - raw))
    ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    return np.round(ticks, 10) + 0.0


def _class(index):
    return f"line s{index % SERIES}"


def _dash(index):
    dash = _DASHES[index % len(_DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""


def _mark(index, x, y):
    """Return the marker of a series; both shape and color tell series apart."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8"/>',
        f'<rect x="{x - 1.6:.1f}" y="{y - 1.6:.1f}" width="3.2" height="3.2"/>',
        f'<path d="M{x:.1f} {y - 2.3:.1f}l2.3 4h-4.6z"/>',
        f'<path d="M{x:.1f} {y - 2.5:.1f}l2.5 2.5l-2.5 2.5l-2.5-2.5z"/>',
    )
    return shapes[index % len(shapes)]
