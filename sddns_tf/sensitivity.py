"""Label-free choice of the shift: how sensitive the score is to shifts it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sddns_tf.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

import numpy as np
import tensorflow as tf

from sddns_tf import metrics, plots, shifts

PROBES = ("rot90", "rot360", "perm4", "perm16", "pixel_perm", "cut_paste")
# A network trained on one of a family detects the others too: see docs/results/earlier.md.
FAMILIES = (("rot90", "rot360"), ("perm4", "perm16", "pixel_perm"))


def sensitivity(
    detector: Any,
    images: Array,
    trained_on: str | Callable | None = None,
    probes: Sequence[str | Callable] = PROBES,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Measure how well the score tells held-out in-distribution images from shifted copies.

    The sensitivity to one probe shift T is the AUROC of the scores of `images` against those of
    `T(images)`. Neither labels nor OOD images are needed. The mean is over the probes other than
    the shift trained on, so two strategies' means are over different probes: to compare strategies,
    use `compare`.

    Args:
        detector: Trained `Detector`.
        images: Held-out in-distribution images, square, uint8 or float in 0-255, `(N, S, S, 3)`.
        trained_on: Shift that made the negatives, by name or callable; left out of the mean.
        probes: Names, or callables: see `shifts.get`.
        seed: Integer; fixes the draws of the probes.
        batch_size: Images per forward pass; None leaves it to `Detector.predict`.

    Returns:
        Dictionary: the AUROC of each probe by name, and their mean as `"mean"`.

    Example:
        >>> sensitivity(detector, held_out_images, "rot90", probes=("rot360", "perm4"))
        {'rot360': 0.93, 'perm4': 0.87, 'mean': 0.90}

    Reference:
        Rafiee et al., arXiv 2201.06378. The definition is this package's: the abstract says what
        the sensitivity is for, and that it comes from the score alone.
    """
    names = [shifts.name_of(probe) for probe in probes]
    trained_name = shifts.name_of(shifts.get(trained_on)) if trained_on else None
    # With their places, so that the draws of a probe do not depend on what is left out.
    pairs = enumerate(zip(names, probes, strict=True))
    used = [(index, pair) for index, pair in pairs if pair[0] != trained_name]
    if not used:
        raise ValueError(
            "`probes` must hold a shift other than the one trained on. Received: "
            f"probes={probes}, trained_on={trained_on!r}"
        )
    scores = _scores(detector, images, batch_size)
    result = {}
    for index, (name, probe) in used:
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
    """Measure how well sensitivities rank strategies by true AUROC: Spearman's correlation.

    The interval is a bootstrap over strategies. For few strategies it is wide, as it should be;
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
    # `scipy.stats.bootstrap` would make an interval of NaN from it.
    count = pairs.shape[1]
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    drawn = pairs[:, draws]
    drawn = drawn[:, (np.ptp(drawn, axis=-1) > 0).all(0)]
    correlations = _rank_correlations(*_standardized_ranks(drawn))
    return float(spearmanr(*pairs).statistic), *metrics.percentile_interval(
        correlations, confidence
    )


class Comparison(NamedTuple):
    """What the sensitivities of several strategies show.

    Attributes:
        means: Dict from each strategy to its mean over probes and runs, the highest first.
        differences: Dict from each other strategy to `(mean, low, high)`: the first strategy minus
            that one. Empty if each has one run.
        chosen: The first strategy, or None if there are doubts.
        doubts: Reasons why none is chosen, as sentences; empty if one is.
    """

    means: dict[str, float]
    differences: dict[str, tuple[float, float, float]]
    chosen: str | None
    doubts: list[str]


def untouched(
    trained_on: Iterable[str | Callable | None], probes: Sequence[str | Callable] = PROBES
) -> tuple[str | Callable, ...]:
    """Return the probes that no strategy is trained on, nor on another shift of their family.

    Args:
        trained_on: The shift of each strategy, by name or callable; None for no negatives.
        probes: Names of shifts, or callables.

    Returns:
        Those of `probes` that are left.

    Example:
        >>> untouched([None, "rot90"])
        ('perm4', 'perm16', 'pixel_perm', 'cut_paste')
    """
    names = {shifts.name_of(shift) for shift in trained_on if shift}
    for family in FAMILIES:
        if names & set(family):
            names |= set(family)
    return tuple(probe for probe in probes if shifts.name_of(probe) not in names)


def compare(
    found: Mapping[str, Sequence[Mapping[str, float]]],
    probes: Sequence[str],
    confidence: float = 0.95,
) -> Comparison:
    """Compare strategies on the same probes, and choose one if the evidence is strong enough.

    One is chosen if there are at least two probes and its mean is above that of every other
    strategy by more than chance: the interval of the difference, paired by run, lies above 0. The
    intervals are Student's, with Bonferroni's correction for all pairs of strategies, because the
    same runs decide which pairs are compared.

    Args:
        found: Dict from each strategy to what `sensitivity` found for each of its runs, with the
            same seeds in the same order for all of them.
        probes: Names of the probes to compare by: those of `untouched`.
        confidence: How often all intervals should hold the true differences, between 0 and 1.

    Returns:
        `Comparison`.

    Raises:
        ValueError: If there are fewer than two strategies, numbers of runs differ, or a probe is
            missing.

    Example:
        >>> compare({"none": [{"perm4": 0.5}], "rot90": [{"perm4": 0.6}]}, ["perm4"]).chosen is None
        True
    """
    _check_found(found, probes)
    values = {
        name: np.array([np.mean([run[probe] for probe in probes]) for run in each])
        for name, each in found.items()
    }
    first, *others = sorted(values, key=lambda name: -values[name].mean())
    pairs = len(values) * (len(values) - 1) // 2
    differences = {
        other: _mean_interval(values[first] - values[other], 1 - (1 - confidence) / pairs)
        for other in others
        if len(values[first]) > 1
    }
    alike = [other for other, (_, low, _) in differences.items() if low <= 0]
    doubts = []
    if len(probes) < 2:
        doubts.append(f"only one probe, {probes[0]}, is unlike every shift that is trained on")
    if not differences:
        doubts.append("with one run each, nothing tells how much another run would differ")
    if alike:
        doubts.append(f"{first} differs from {', '.join(alike)} by no more than chance")
    means = {name: float(values[name].mean()) for name in (first, *others)}
    return Comparison(means, differences, None if doubts else first, doubts)


def permutation_test(
    sensitivities: Mapping[str, Array], aurocs: Array, resamples: int = 9999, seed: int = 0
) -> tuple[str, float, float]:
    """Test whether the best of several definitions of sensitivity ranks strategies at all.

    Of many definitions, one will rank a few strategies well by chance. So the rank correlation of
    the best one is compared with that of the best one when the AUROCs are assigned to the
    strategies at random. All orders are tried if there are no more than `resamples`.

    Args:
        sensitivities: Dict from the name of *every* definition tried to its value for each
            strategy, `(S,)`, NaN where it does not apply.
        aurocs: Mean true AUROC of each strategy, `(S,)`.
        resamples: Number of random orders.
        seed: Integer; fixes them.

    Returns:
        `(name, value, p_value)` of the definition with the largest Spearman correlation.

    Raises:
        ValueError: If lengths differ, or a definition has fewer than 3 strategies or does not tell
            them apart.

    Example:
        >>> permutation_test({"mean": [0.6, 0.7, 0.8]}, [0.75, 0.81, 0.93])
        ('mean', 1.0, 0.167)

    Reference:
        Westfall and Young, "Resampling-Based Multiple Testing", 1993, chapter 2 (the best of many).
    """
    from scipy import stats

    aurocs = metrics.as_scores(aurocs, "aurocs")
    ranked = {}
    for name, values in sensitivities.items():
        values = np.asarray(values, np.float64)
        applies = np.isfinite(values)
        if values.shape != aurocs.shape or applies.sum() < 3 or np.ptp(values[applies]) == 0:
            raise ValueError(
                f"`sensitivities` must tell 3 of {len(aurocs)} strategies or more apart. "
                f"Received: {name}={values.tolist()}"
            )
        ranked[name] = applies, _standardized_ranks(values[applies])

    def correlations(order):
        return np.stack(
            [
                _rank_correlations(_standardized_ranks(order[..., at]), ranks)
                for at, ranks in ranked.values()
            ]
        )

    found = stats.permutation_test(
        (aurocs,),
        lambda order, axis: correlations(order).max(0),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=resamples,
        vectorized=True,
        axis=-1,
        rng=seed,
    )
    name = list(ranked)[int(correlations(aurocs).argmax())]
    return name, float(found.statistic), float(found.pvalue)


def bar_chart(sensitivities: dict[str, float], aurocs: dict[str, float] | None = None) -> Figure:
    """Draw the sensitivity of each strategy, the highest first, beside its true AUROC.

    Args:
        sensitivities: Dict from the name of a strategy to its mean sensitivity.
        aurocs: Dict from the same names to mean true AUROCs, or None.

    Returns:
        A `matplotlib.figure.Figure`.

    Example:
        >>> figure = bar_chart({"rot90": 0.91, "perm4": 0.84}, {"rot90": 0.93, "perm4": 0.85})
    """
    names = sorted(sensitivities, key=sensitivities.__getitem__)
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


def _check_found(found, probes):
    runs = {name: len(each) for name, each in found.items()}
    if len(found) < 2 or len(set(runs.values())) > 1 or not all(runs.values()):
        raise ValueError(
            f"`found` must hold two strategies or more, of as many runs each. Received: {runs}"
        )
    measured = set.intersection(*(set(run) for each in found.values() for run in each))
    if not probes or not measured.issuperset(probes):
        raise ValueError(
            f"`probes` must name probes that every run was measured with, {sorted(measured)}. "
            f"Received: {tuple(probes)}"
        )


def _mean_interval(values, confidence):
    from scipy import stats

    mean, error = float(np.mean(values)), stats.sem(values)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)
    return mean, mean - half, mean + half


def _same(aurocs, length):
    values = metrics.as_scores(aurocs, "aurocs")
    if len(values) != length:
        raise ValueError(f"`aurocs` must have one entry per strategy. Received: {len(values)}.")
    return values


def _standardized_ranks(values):
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    spread = ranks.std(-1, keepdims=True)
    return np.divide(ranks, spread, out=np.zeros_like(ranks), where=spread > 0)


def _rank_correlations(left, right):
    return np.clip((left * right).mean(-1), -1.0, 1.0)  # rounding can lead beyond 1


def _scores(detector, images, batch_size):
    return detector.predict(images, batch_size=batch_size, verbose=0)["ood_score"]
