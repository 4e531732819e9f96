"""Pictures of scores: histograms and receiver operating characteristics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sddns_tf.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from collections.abc import Mapping

import numpy as np

from sddns_tf.metrics import as_scores, ood_metrics
from sddns_tf.plots.style import BLACK, BLUE, VERMILION, figure_of, line_style, wrapped

# The axis is bent where it is so many times as long as the range of the normal scores.
_BENT_FROM = 12

SCORE_LABEL = "OOD score (higher: more out-of-distribution)"


def score_histograms(id_scores: Array, ood_scores: Array, threshold: float | None = None) -> Figure:
    """Draw histograms of the scores of normal images against each out-of-distribution set.

    One row per set, all on the same score axis, with the in-distribution scores repeated in each.
    Every histogram is scaled to its own peak, so that sets of any size and spread can be
    compared. If some scores are so far away that those of normal images would be a single bar, the
    axis is linear around these and logarithmic beyond. If scores have long tails, the axis stops
    short of them: scores beyond it are counted in the outermost bins, and a note says how many
    there are.

    Args:
        id_scores: Scores of in-distribution images, `(N,)`, higher meaning more
            out-of-distribution.
        ood_scores: Dict from the name of a set to its scores, `(M,)`.
        threshold: Score above which images are flagged: `Detector.threshold`. Adds a line and the
            share flagged.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no set, scores are not one-dimensional, empty or not finite, or
            the threshold is not finite.

    Example:
    >>> scores = {"textures": detector.predict(textures)["ood_score"]}
    >>> figure = sddns_tf.plots.score_histograms(
    ...     detector.predict(normal)["ood_score"], scores, threshold=-3.5)
    """
    id_scores, ood_scores = _score_sets(id_scores, ood_scores)
    if threshold is not None and not np.isfinite(threshold):
        raise ValueError(f"`threshold` must be a finite number. Received: {threshold}.")
    everything = np.concatenate([id_scores, *ood_scores.values()])
    low, high = _score_limits([id_scores, *ood_scores.values()])
    bent = high - low > _BENT_FROM * np.ptp(id_scores) > 0
    bend, unbend = _axis_around(id_scores) if bent else (np.copy, np.copy)
    bins = unbend(np.linspace(bend(low), bend(high), 61))
    bins[[0, -1]] = low, high  # as they are, not as rounding leaves them

    figure = figure_of(7.0, 1.25 + 1.05 * len(ood_scores))
    rows = figure.subplots(len(ood_scores), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, scores) in zip(rows, ood_scores.items(), strict=True):
        for values, color, label in (
            (id_scores, BLUE, "in-distribution"),
            (scores, VERMILION, "out-of-distribution"),
        ):
            counts, _ = np.histogram(np.clip(values, low, high), bins)
            axes.stairs(counts / counts.max(), bins, fill=True, color=color, alpha=0.3)
            axes.stairs(counts / counts.max(), bins, color=color, linewidth=1.2, label=label)
        facts = f"AUROC {ood_metrics(id_scores, scores)['auroc']:.3f}"
        if threshold is not None:
            facts += f", {np.mean(scores > threshold):.0%} flagged"
            if low <= threshold <= high:
                axes.axvline(threshold, color=BLACK, linewidth=1, linestyle="--", label="threshold")
        axes.set_title(wrapped(f"{name}  ({facts})", 88), loc="left", fontsize=9)
        if bent:
            axes.set_xscale("function", functions=(bend, unbend))
            ticks = _round_numbers(unbend(np.linspace(bend(low), bend(high), 10)), low, high)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(xlim=(low, high), ylim=(0, 1.08), yticks=[])
        axes.spines[["left", "top", "right"]].set_visible(False)
    rows[-1].set_xlabel(SCORE_LABEL)
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)

    notes = ["Each histogram is scaled to its own peak."]
    if bent:
        notes.append("The score axis is stretched around the in-distribution scores.")
    beyond = np.count_nonzero((everything < low) | (everything > high))
    if beyond:
        notes.append(
            f"Long tails: {beyond} of {everything.size} scores lie beyond the axis "
            "and are counted in its outermost bins."
        )
    if threshold is not None:
        share = f"{np.mean(id_scores > threshold):.1%} of in-distribution images"
        notes.append(f"The threshold {threshold:.4g} flags {share}.")
        if not low <= threshold <= high:
            notes.append(f"It lies {'left' if threshold < low else 'right'} of the axis.")
    figure.supxlabel(wrapped(" ".join(notes), 105), fontsize=8, color="0.35")
    return figure


def roc_curves(id_scores: Array, ood_scores: Array) -> Figure:
    """Draw the ROC curve of each out-of-distribution set, AUROC in the legend.

    Args:
        id_scores: Scores of in-distribution images, `(N,)`, higher meaning more
            out-of-distribution.
        ood_scores: Dict from the name of a set to its scores, `(M,)`.

    Returns:
        A `matplotlib.figure.Figure`. Flagged out-of-distribution images are the true positives.

    Raises:
        ValueError: if there is no set, or scores are not one-dimensional, empty or not finite.

    Example:
    >>> figure = sddns_tf.plots.roc_curves(normal_scores, {"textures": texture_scores})
    """
    from sklearn.metrics import roc_curve

    id_scores, ood_scores = _score_sets(id_scores, ood_scores)
    labels = [
        wrapped(f"{ood_metrics(id_scores, scores)['auroc']:.3f}  {name}", 64)
        for name, scores in ood_scores.items()
    ]
    lines = 2 + sum(label.count("\n") + 1 for label in labels)
    figure = figure_of(5.4, 5.1 + 0.17 * lines)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="0.500  chance")
    for index, (scores, label) in enumerate(zip(ood_scores.values(), labels, strict=True)):
        is_ood = np.repeat([0, 1], [id_scores.size, scores.size])
        false_positives, true_positives, _ = roc_curve(is_ood, np.concatenate([id_scores, scores]))
        axes.plot(false_positives, true_positives, label=label, linewidth=1.6, **line_style(index))
    axes.set(
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
        xlabel="In-distribution images flagged (false positive rate)",
        ylabel="Out-of-distribution images flagged (true positive rate)",
    )
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[1:] + handles[:1],
        labels[1:] + labels[:1],
        title="AUROC",
        alignment="left",
        loc="outside lower center",
        frameon=False,
        fontsize=9,
    )
    return figure


def _axis_around(scores):
    """Return a function that is linear around scores and logarithmic beyond, and its inverse."""
    center, width = np.median(scores), np.ptp(scores) / 2

    def bend(values):
        return np.arcsinh((values - center) / width)

    def unbend(values):
        return np.sinh(values) * width + center

    return bend, unbend


def _round_numbers(values, low, high):
    """Return values with two digits that lie between two others."""
    rounded = sorted({float(f"{value:.2g}") for value in values})
    return [value for value in rounded if low <= value <= high]


def _score_sets(id_scores, ood_scores):
    if not isinstance(ood_scores, Mapping) or not ood_scores:
        raise ValueError(
            "`ood_scores` must be a dict from a name to scores, with at least one entry. "
            f"Received: {type(ood_scores).__name__}: {ood_scores!r:.80}."
        )
    sets = {
        str(name): as_scores(scores, f"ood_scores[{name!r}]") for name, scores in ood_scores.items()
    }
    return as_scores(id_scores, "id_scores"), sets


def _score_limits(sets):
    """Return limits that show all of every set except its long tails.

    The limits are the 5 and 95 % quantiles, moved outward by the distance between them: 4.9
    standard deviations of a normal distribution, which thus fits entirely.
    """
    low, high = np.inf, -np.inf
    for scores in sets:
        first, last = np.quantile(scores, [0.05, 0.95])
        margin = last - first
        low = min(low, max(scores.min(), first - margin))
        high = max(high, min(scores.max(), last + margin))
    if low == high:
        margin = max(0.5, 1e-3 * abs(low))
        return low - margin, high + margin
    return low, high
