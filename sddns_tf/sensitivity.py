"""Label-free choice of the shift: how sensitive the score is to shifts it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sddns_tf.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

import numpy as np
import tensorflow as tf

from sddns_tf import metrics, plots, shifts

PROBES = ("rot90", "rot360", "perm4", "perm16", "pixel_perm")


def sensitivity(
    detector: Any,
    images: Array,
    trained_on: str | Callable | None = None,
    probes: Sequence[str | Callable] = PROBES,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, float]:
    """Measure how well the score tells held-out in-distribution images from their shifted selves.

    The sensitivity to one probe shift T is the AUROC of the scores of `images` against those of
    `T(images)`; that of a training strategy is the mean over the probes other than the shift it
    trained on. Neither labels nor OOD images are needed, so it can choose a strategy.

    Args:
        detector: Trained `Detector`.
        images: Held-out in-distribution images, squares, uint8 or float in 0-255, `(N, S, S, 3)`.
        trained_on: Shift that made the negatives, by name or callable; left out of the mean.
        probes: Names from `shifts.NAMES`, or callables.
        seed: Integer; fixes the draws of the probes.
        batch_size: Images per forward.

    Returns:
        Dictionary: the AUROC of each probe by name, and their mean as `"mean"`.

    Example:
        >>> sensitivity(detector, held_out_images, trained_on="rot90")
        {'rot360': 0.93, 'perm4': 0.87, 'perm16': 0.94, 'pixel_perm': 1.0, 'mean': 0.935}

    Reference:
        Rafiee et al., arXiv 2201.06378. The definition is this package's: the abstract says what
        the sensitivity is for, and that it comes from the score alone.
    """
    names = [shifts.name_of(probe) for probe in probes]
    trained_name = shifts.name_of(shifts.get(trained_on)) if trained_on else None
    used = [pair for pair in zip(names, probes, strict=True) if pair[0] != trained_name]
    if not used:
        raise ValueError(
            "`probes` must hold a shift other than the one trained on. Received: "
            f"probes={probes}, trained_on={trained_on!r}"
        )
    scores = _scores(detector, images, batch_size)
    result = {}
    for index, (name, probe) in enumerate(used):
        shifted = shifts.get(probe)(tf.convert_to_tensor(images), [seed, index]).numpy()
        shifted_scores = _scores(detector, shifted, batch_size)
        result[name] = metrics.ood_metrics(scores, shifted_scores)["auroc"]
    return {**result, "mean": float(np.mean(list(result.values())))}


def rank_correlation(
    sensitivities: Array,
    aurocs: Array,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Measure how well sensitivities rank strategies as true AUROCs do: Spearman's correlation.

    The interval is the bootstrap's over strategies. Of few strategies it is wide, as it should be;
    draws in which all strategies tie rank nothing and are left out.

    Args:
        sensitivities: Mean sensitivity of each strategy, `(S,)`, S at least 3.
        aurocs: Mean true AUROC of each, `(S,)`.
        confidence: Share of the resampled values inside the interval, between 0 and 1.
        resamples: Number of times to draw strategies.
        seed: Integer; fixes the draws.

    Returns:
        `(value, low, high)`, Python floats.

    Raises:
        ValueError: If lengths differ, there are fewer than 3, or all values of one side are equal.

    Example:
        >>> rank_correlation([0.7, 0.8, 0.9, 0.6], [0.75, 0.81, 0.93, 0.7])
        (1.0, 1.0, 1.0)

    Reference:
        Spearman, "The proof and measurement of association between two things", 1904.
    """
    from scipy.stats import spearmanr

    pairs = np.stack(
        [metrics.as_scores(sensitivities, "sensitivities"), _same(aurocs, len(sensitivities))]
    )
    if pairs.shape[1] < 3 or (np.ptp(pairs, axis=1) == 0).any():
        raise ValueError(
            "A rank correlation takes at least 3 strategies that differ. Received: "
            f"sensitivities={pairs[0].tolist()}, aurocs={pairs[1].tolist()}"
        )
    # By hand: a draw in which all strategies are alike has no rank correlation and is left out;
    # of it `scipy.stats.bootstrap` would make an interval of NaN.
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        sample = pairs[:, generator.integers(0, pairs.shape[1], pairs.shape[1])]
        if (np.ptp(sample, axis=1) > 0).all():
            drawn.append(spearmanr(*sample).statistic)
    return float(spearmanr(*pairs).statistic), *metrics.percentile_interval(drawn, confidence)


def bar_chart(sensitivities: Array, aurocs: Array | None = None) -> Figure:
    """Draw the sensitivity of each strategy, the highest first, beside its true AUROC.

    Args:
        sensitivities: Dict from the name of a strategy to its mean sensitivity.
        aurocs: Dict from the same names to mean true AUROCs, or None.

    Returns:
        A `matplotlib.figure.Figure`.

    Example:
        >>> figure = bar_chart({"rot90": 0.91, "perm4": 0.84}, {"rot90": 0.93, "perm4": 0.85})
    """
    names = sorted(sensitivities, key=sensitivities.get)
    bars = {"sensitivity (no labels, no OOD data)": (sensitivities, plots.BLUE)}
    if aurocs:
        bars["true AUROC"] = (aurocs, plots.VERMILION)
    height = 0.8 / len(bars)
    figure = plots.figure_of(7.0, 1.2 + 0.5 * len(names))
    axes = figure.subplots()
    for index, (label, (values, color)) in enumerate(bars.items()):
        places = np.arange(len(names)) + 0.4 - height * (index + 0.5)
        drawn = axes.barh(places, [values[n] for n in names], height, color=color, label=label)
        axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=8)
    axes.axvline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.1), xlabel="AUROC")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    return figure


def _same(aurocs, length):
    values = metrics.as_scores(aurocs, "aurocs")
    if len(values) != length:
        raise ValueError(f"`aurocs` must have one entry per strategy. Received: {len(values)}.")
    return values


def _scores(detector, images, batch_size):
    return detector.predict(images, batch_size=batch_size, verbose=0)["ood_score"]
