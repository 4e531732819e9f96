"""Metrics, thresholds and drift of any number of scores, from sketches that can be merged.

A sketch counts scores in bins of equal width. It does not know the order of scores within a bin, so
a metric comes as the two values between which the exact one lies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import apache_beam as beam
import numpy as np

from sddns_tf.calibration import largest_flagged_rank
from sddns_tf.types import Array
from sddns_tf.validation import check_int, check_number

# Beyond any score: for infinite scores, and for NaN, which counts as highest.
_BEYOND = 2**62
_PENDING = 4096


class ScoreSketch:
    """Counts the scores in each bin exactly, in memory that does not grow with their number.

    Args:
        width: Width of a bin, positive float. Scores are logarithms over a temperature of 0.04 and
            lie between -22.5 and 27.5 by default, so there are at most 50,000 bins of 0.001.

    Example:
    >>> sketch = ScoreSketch()
    >>> sketch.add(scores)
    >>> lower_edges, counts = sketch.histogram()
    """

    def __init__(self, width: float = 0.001) -> None:
        check_number("width", width, above=0.0)
        self.width = float(width)
        self._levels = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._pending: list[float] = []

    def add(self, scores: Array) -> None:
        """Add scores.

        Args:
            scores: Float, or floats `(N,)`. Infinite ones are counted beyond the rest, and so is
                NaN, which counts as highest, as in the detector.
        """
        self._pending.extend(np.asarray(scores, np.float64).ravel().tolist())
        if len(self._pending) >= _PENDING:
            self._flush()

    def merge(self, other: ScoreSketch) -> None:
        """Add the counts of another sketch.

        Raises:
            ValueError: If its bins have another width.
        """
        if other.width != self.width:
            raise ValueError(
                "Sketches to merge must have bins of one width. "
                f"Received: {self.width} and {other.width}"
            )
        other._flush()
        self._take(other._levels, other._counts)

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower edges of the bins that are not empty, ascending, and their counts."""
        self._flush()
        edges = self._levels * self.width
        edges[self._levels == -_BEYOND] = -math.inf
        edges[self._levels == _BEYOND] = math.inf
        return edges, self._counts.copy()

    @property
    def count(self) -> int:
        """Number of scores."""
        return int(self._counts.sum()) + len(self._pending)

    def threshold(self, false_positive_rate: float) -> float:
        """Return the score above which to flag, if these are scores of calibration images.

        As for `Detector`, at most that share of exchangeable normal images lies above it. It is
        the upper edge of the bin that holds the detector's threshold, so it is at most `width` too
        high, and the promise still holds.

        Args:
            false_positive_rate: Between 0 and 1.

        Returns:
            Float; infinite if there are too few scores for the rate, so that nothing is flagged.
        """
        check_number("false_positive_rate", false_positive_rate, above=0.0, below=1.0)
        if self.count < math.ceil(1.0 / false_positive_rate - 1e-6) - 1:
            return math.inf
        rank = largest_flagged_rank(self.count, false_positive_rate)
        self._flush()
        from_above = np.cumsum(self._counts[::-1])
        level = self._levels[::-1][np.searchsorted(from_above, rank)]
        return math.inf if level == _BEYOND else float((level + 1) * self.width)

    def _flush(self) -> None:
        if not self._pending:
            return
        scores = np.array(self._pending)
        self._pending = []
        scores[np.isnan(scores)] = math.inf
        levels = np.clip(np.floor(scores / self.width), -_BEYOND, _BEYOND).astype(np.int64)
        self._take(levels, np.ones(len(levels), np.int64))

    def _take(self, levels: np.ndarray, counts: np.ndarray) -> None:
        levels = np.concatenate([self._levels, levels])
        self._levels, places = np.unique(levels, return_inverse=True)
        both = np.concatenate([self._counts, counts])
        self._counts = np.zeros(len(self._levels), np.int64)
        np.add.at(self._counts, places, both)


def sketched_metrics(normal: ScoreSketch, other: ScoreSketch) -> dict[str, tuple[float, float]]:
    """Measure how well scores separate, as `metrics.ood_metrics` does, from sketches.

    Args:
        normal: Sketch of the scores of in-distribution images.
        other: Sketch of the scores of out-of-distribution images.

    Returns:
        Dict of `"auroc"` and `"fpr95"`, each `(low, high)`: the exact value lies between these. The
        width of `"auroc"` is the share of pairs of a normal and another score in one bin.

    Raises:
        ValueError: If a sketch is empty, or their bins differ.

    Example:
    >>> sketched_metrics(normal, other)
    {'auroc': (0.91234, 0.91251), 'fpr95': (0.3017, 0.3018)}
    """
    if normal.width != other.width or not normal.count or not other.count:
        raise ValueError(
            "Metrics need two sketches with bins of one width, neither of them empty. Received: "
            f"widths {normal.width} and {other.width}, {normal.count} and {other.count} scores"
        )
    (edges, counts), (other_edges, other_counts) = normal.histogram(), other.histogram()
    total, other_total = counts.sum(), other_counts.sum()

    def share_below(at: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        """Return the share of normal scores in bins before each of `at`, or up to it."""
        before = np.searchsorted(edges, at, side)
        return np.concatenate([[0], np.cumsum(counts)])[before] / total

    weights = other_counts / other_total
    # As in `ood_metrics`: the lowest threshold that accepts 95 % of the normal images.
    accepted = -(-95 * int(total) // 100)
    at = edges[np.searchsorted(np.cumsum(counts), accepted)]
    return {
        "auroc": (
            float(weights @ share_below(other_edges, "left")),
            float(weights @ share_below(other_edges, "right")),
        ),
        "fpr95": (
            float(other_counts[other_edges < at].sum() / other_total),
            float(other_counts[other_edges <= at].sum() / other_total),
        ),
    }


class SketchScores(beam.CombineFn):
    """Combines scores with `ScoreSketch`.

    Args:
        width: As for `ScoreSketch`.

    Example:
    >>> sketches = named_scores | beam.CombinePerKey(SketchScores()) | beam.combiners.ToDict()
    >>> sketches | beam.Map(lambda of: sketched_metrics(of["normal"], of["textures"]))
    """

    def __init__(self, width: float = 0.001) -> None:
        super().__init__()
        self._width = width
        self.create_accumulator()  # Checks it.

    def create_accumulator(self) -> ScoreSketch:
        """Return an empty sketch."""
        return ScoreSketch(self._width)

    def add_input(self, sketch: ScoreSketch, scores: Array) -> ScoreSketch:
        """Add a score, or scores `(N,)`."""
        sketch.add(scores)
        return sketch

    def merge_accumulators(self, sketches: Iterable[ScoreSketch]) -> ScoreSketch:
        """Merge sketches."""
        merged = self.create_accumulator()
        for sketch in sketches:
            merged.merge(sketch)
        return merged

    def extract_output(self, sketch: ScoreSketch) -> ScoreSketch:
        """Return the sketch."""
        return sketch


class Thresholds(beam.PTransform):
    """Maps scores of calibration images to a threshold for each group, such as a camera.

    Args:
        false_positive_rate: Largest share of normal images of each group to flag.
        width: Width of the bins, and the most that thresholds may be too high: see `ScoreSketch`.

    Returns:
        Collection of pairs of a group and its threshold: see `ScoreSketch.threshold`.

    Example:
    >>> thresholds = scores_of_cameras | Thresholds(false_positive_rate=0.01)
    """

    def __init__(self, false_positive_rate: float, width: float = 0.001) -> None:
        super().__init__()
        check_number("false_positive_rate", false_positive_rate, above=0.0, below=1.0)
        self._rate, self._width = false_positive_rate, width

    def expand(self, scores: Any) -> Any:
        """Map pairs of a group and a score."""
        sketches = scores | beam.CombinePerKey(SketchScores(self._width))
        return sketches | beam.Map(_threshold, self._rate)


def _threshold(of_group: tuple[Any, ScoreSketch], rate: float) -> tuple[Any, float]:
    group, sketch = of_group
    return group, sketch.threshold(rate)


class Drift(NamedTuple):
    """How far p-values of a group are from those of normal images.

    Attributes:
        total: Number of p-values.
        distance: Largest distance between the two distribution functions (Kolmogorov-Smirnov).
        limit: Distance that is exceeded by chance with the chosen probability.
        has_drifted: Whether it exceeds the limit.
    """

    total: int
    distance: float
    limit: float
    has_drifted: bool


class CheckDrift(beam.PTransform):
    """Checks whether p-values have drifted, for each group, such as a day, a camera or a line.

    P-values of normal images are uniform over `1/(N+1), ..., 1` on average over sets of N
    calibration images; for a single set they differ from that as two samples differ from each
    other, so this is the two-sample Kolmogorov-Smirnov test. P-values are counted by rank, exactly.

    Args:
        calibration_size: Number of calibration images of the detector, N.
        significance: Probability of an alarm if nothing has changed, for each group.

    Returns:
        Collection of pairs of a group and `Drift`.

    Example:
    >>> drifts = p_values_of_days | CheckDrift(calibration_size=2500)

    Reference:
        Smirnov, "Table for estimating the goodness of fit of empirical distributions", 1948: the
        limit, for large samples.
    """

    def __init__(self, calibration_size: int, significance: float = 0.001) -> None:
        super().__init__()
        check_int("calibration_size", calibration_size)
        check_number("significance", significance, above=0.0, below=1.0)
        self._size, self._significance = calibration_size, significance

    def expand(self, p_values: Any) -> Any:
        """Map pairs of a group and a p-value."""
        counted = p_values | beam.CombinePerKey(_CountRanks(self._size + 1))
        return counted | beam.Map(_drift, self._size, self._significance)


class _CountRanks(beam.CombineFn):
    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks

    def create_accumulator(self) -> Counter:
        return Counter()

    def add_input(self, counts: Counter, p_value: float) -> Counter:
        counts[round(p_value * self._ranks)] += 1
        return counts

    def merge_accumulators(self, counters: Iterable[Counter]) -> Counter:
        return sum(counters, Counter())

    def extract_output(self, counts: Counter) -> Counter:
        return counts


def _drift(of_group: tuple[Any, Counter], size: int, significance: float) -> tuple[Any, Drift]:
    from scipy.stats import kstwobign

    group, counts = of_group
    ranks = np.arange(1, size + 2)
    count = counts.total()
    found = np.cumsum([counts[rank] for rank in ranks.tolist()]) / count
    distance = float(np.abs(found - ranks / (size + 1)).max())
    limit = float(kstwobign.isf(significance)) * math.sqrt(1.0 / count + 1.0 / size)
    return group, Drift(count, distance, limit, distance > limit)
