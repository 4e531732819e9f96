"""Measures how well scores find anomalies and features tell classes apart, with intervals.

Longer than other modules: a dozen independent functions, and much of it explains them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sddns_tf.types import Array

BLOCK_ELEMENTS = 2**24  # largest matrix of cosines held at once: 64 MiB of float32


def as_scores(scores: Array, name: str = "scores") -> np.ndarray:
    """Check an array of scores and return it as float64.

    Args:
        scores: One number per image, `(N,)`, N >= 1, all finite.
        name: What to call the array in an error.

    Returns:
        NumPy float64 array `(N,)`.

    Raises:
        ValueError: if the array has another rank, is empty or holds NaN or infinity.
    """
    values = np.asarray(scores)
    if values.ndim != 1:
        raise ValueError(
            f"`{name}` must have shape (N,), one score per image. Received: shape {values.shape}."
        )
    if values.size == 0:
        raise ValueError(f"`{name}` must hold at least one score. Received: an empty array.")
    values = values.astype("float64")
    not_finite = int(np.count_nonzero(~np.isfinite(values)))
    if not_finite:
        raise ValueError(
            f"`{name}` must be finite. Received: {not_finite} NaN or infinite of {values.size}."
        )
    return values


def ood_metrics(id_scores: Array, ood_scores: Array) -> dict[str, float]:
    """Measure how well a score separates out-of-distribution from in-distribution images.

    Scores follow `bank.ood_score`: higher means more out-of-distribution.

    - `auroc`: the chance that a random out-of-distribution image scores higher than a random
      in-distribution one, ties counting half. It is the same whichever side is called positive.
    - `aupr_out`: average precision with the out-of-distribution images as positives.
    - `aupr_in`: average precision with the in-distribution images as positives, ranked by the
      negated score. Both depend on the sizes of the two sets, AUROC and FPR95 do not.
    - `fpr95`: false positive rate at 95 % true positive rate in the convention of ODIN and
      OpenOOD, where *in-distribution* images are the positives: the threshold is the lowest
      in-distribution score `t` such that at least 95 % of the in-distribution scores are
      `<= t` (accepted), and `fpr95` is the share of out-of-distribution scores `<= t`. Nothing
      is interpolated; an out-of-distribution score equal to `t` counts as accepted, since no
      threshold could reject it and still accept the in-distribution images that tie with it.
      (The opposite convention, false alarms at 95 % of anomalies found, gives other numbers.)

    Args:
        id_scores: Scores of in-distribution images, `(N,)`, finite.
        ood_scores: Scores of out-of-distribution images, `(M,)`, finite.

    Returns:
        Dict of Python floats in 0-1: `auroc`, `aupr_in`, `aupr_out`, `fpr95`.

    Raises:
        ValueError: if an array is not one-dimensional, is empty or holds NaN or infinity.

    Example:
    >>> sddns_tf.metrics.ood_metrics([0.1, 0.2, 0.3], [0.2, 0.8])["fpr95"]
    0.5

    Reference:
        - [Liang et al., ODIN, section 4.3](https://arxiv.org/abs/1706.02690)
        - [Yang et al., OpenOOD](https://arxiv.org/abs/2210.07242)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    id_scores = as_scores(id_scores, "id_scores")
    ood_scores = as_scores(ood_scores, "ood_scores")
    scores = np.concatenate([id_scores, ood_scores])
    is_ood = np.repeat([0, 1], [id_scores.size, ood_scores.size])

    accepted = -(-95 * id_scores.size // 100)  # ceil(0.95 N) in exact integers
    threshold = np.sort(id_scores)[accepted - 1]
    return {
        "auroc": float(roc_auc_score(is_ood, scores)),
        "aupr_in": float(average_precision_score(1 - is_ood, -scores)),
        "aupr_out": float(average_precision_score(is_ood, scores)),
        "fpr95": float(np.mean(ood_scores <= threshold)),
    }


def ood_metric_intervals(
    id_scores: Array,
    ood_scores: Array,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of `ood_metrics`: how much they would move with other test images.

    Both sets are resampled with replacement, `resamples` times; an interval holds the middle
    `confidence` of a metric's values. It says nothing about how much another training run would
    differ.

    Args:
        id_scores: Scores of in-distribution images, `(N,)`, finite.
        ood_scores: Scores of out-of-distribution images, `(M,)`, finite.
        confidence: Share of the resampled values inside the interval, between 0 and 1.
        resamples: Number of times to draw.
        seed: Int, fixes the draws.

    Returns:
        Dict from each name of `ood_metrics` to `(low, high)`, Python floats.

    Raises:
        ValueError: as for `ood_metrics`, and if `confidence` or `resamples` is out of range.

    Example:
    >>> sddns_tf.metrics.ood_metric_intervals(normal_scores, texture_scores)["auroc"]
    (0.912, 0.931)

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentiles).
    """
    id_scores = as_scores(id_scores, "id_scores")
    ood_scores = as_scores(ood_scores, "ood_scores")
    _check_bootstrap(confidence, resamples)
    generator = np.random.default_rng(seed)
    levels, positions = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    id_positions, ood_positions = np.split(positions, [id_scores.size])
    # By hand: `scipy.stats.bootstrap` draws the same, but refuses a set of one image.
    values = [
        _metrics_of_counts(
            _resampled_counts(generator, id_positions, levels.size),
            _resampled_counts(generator, ood_positions, levels.size),
        )
        for _ in range(resamples)
    ]
    return {
        name: percentile_interval([value[name] for value in values], confidence)
        for name in values[0]
    }


def share_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's interval of a share, such as images flagged or classified correctly.

    It has width at a share of 0 or 1 too: none flagged of ten does not mean that none ever will be.

    Args:
        share: Share found, in 0-1.
        count: Number of images that it is a share of.
        confidence: How often the interval should hold the true share, between 0 and 1.

    Returns:
        `(low, high)`, Python floats.

    Raises:
        ValueError: if a number is out of range.

    Example:
    >>> sddns_tf.metrics.share_interval(0.05, 1000)
    (0.0382, 0.0653)

    Reference:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    from scipy.stats import binomtest

    _check_bootstrap(confidence, count)
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be in 0-1. Received: {share}.")
    found = binomtest(round(share * count), count).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def percentile_interval(values: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Return the middle `confidence` of resampled values, as `(low, high)`."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(values, tails)
    return float(low), float(high)


def _check_bootstrap(confidence, count):
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1. Received: {confidence}.")
    if count < 1:
        raise ValueError(f"At least one draw is needed. Received: {count}.")


def _resampled_counts(generator, positions, levels):
    """Draw as many scores as there are, and count those on each level, lowest first."""
    drawn = generator.integers(0, positions.size, positions.size)
    return np.bincount(positions[drawn], minlength=levels)


def _metrics_of_counts(id_counts, ood_counts):
    """Compute `ood_metrics` from counts of scores on each level, lowest first; linear in levels.

    Scikit-learn would sort each resampled set, a hundred times as slow for ten thousand images.
    """
    id_below, ood_below = np.cumsum(id_counts), np.cumsum(ood_counts)
    id_total, ood_total = id_below[-1], ood_below[-1]
    id_above, ood_above = id_total - id_below + id_counts, ood_total - ood_below + ood_counts
    wins = ood_counts * (id_below - 0.5 * id_counts)
    accepted = -(-95 * id_total // 100)
    threshold = np.searchsorted(id_below, accepted)
    return {
        "auroc": wins.sum() / (id_total * ood_total),
        "aupr_in": _average_precision(id_counts, id_below, ood_below),
        "aupr_out": _average_precision(ood_counts, ood_above, id_above),
        "fpr95": ood_below[threshold] / ood_total,
    }


def _average_precision(counts, true_positives, false_positives):
    """Compute the precision at each threshold, weighted by the positives that it adds."""
    precision = true_positives / np.maximum(true_positives + false_positives, 1)
    return (counts * precision).sum() / counts.sum()


def at_size(maps: Array, size: tuple[int, int]) -> np.ndarray:
    """Resize anomaly maps to the size of masks, bilinearly.

    Args:
        maps: Scores of places, float `(N, h, w)`.
        size: Height and width of the masks.

    Returns:
        Float32 `(N, height, width)`.

    Example:
    >>> scores = sddns_tf.metrics.at_size(out["anomaly_map"], masks.shape[1:])
    """
    from scipy.ndimage import zoom

    maps = np.asarray(maps, np.float32)
    factors = (1, size[0] / maps.shape[1], size[1] / maps.shape[2])
    return zoom(maps, factors, order=1, mode="nearest", grid_mode=True)


def pixel_auroc(maps: Array, masks: Array) -> float:
    """Return the chance that a damaged pixel scores higher than a sound one, ties counting half.

    Args:
        maps: Scores of pixels, float `(N, H, W)`: see `at_size`.
        masks: True where there is damage, bool `(N, H, W)`; sound images have none.

    Returns:
        Python float in 0-1.

    Raises:
        ValueError: If shapes do not fit, scores are not finite, or all pixels are of one kind.

    Example:
    >>> sddns_tf.metrics.pixel_auroc([[[0.1, 0.9]]], [[[False, True]]])
    1.0
    """
    from sklearn.metrics import roc_auc_score

    maps, masks = _pixels(maps, masks)
    return float(roc_auc_score(masks.ravel(), maps.ravel()))


def aupro(maps: Array, masks: Array, limit: float = 0.3) -> float:
    """Compute the area under the per-region overlap, for false positive rates from 0 to `limit`.

    The overlap at a threshold is the share of a damaged region that scores at least as high,
    averaged over all regions (connected components, diagonals included), so that a small one counts
    as much as a large one. The false positive rate is the share of all sound pixels that score at
    least as high. The area is under straight lines between thresholds, divided by `limit`: 1 is
    perfect.

    Args:
        maps: Scores of pixels, float `(N, H, W)`: see `at_size`.
        masks: True where there is damage, bool `(N, H, W)`.
        limit: Largest false positive rate, above 0 and at most 1.

    Returns:
        Python float in 0-1.

    Raises:
        ValueError: If shapes do not fit, scores are not finite, all pixels are of one kind, or
            `limit` is out of range.

    Example:
    >>> sddns_tf.metrics.aupro(sddns_tf.metrics.at_size(out["anomaly_map"], (256, 256)), masks)

    Reference:
        Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"`limit` must be above 0 and at most 1. Received: {limit}")
    maps, masks = _pixels(maps, masks)
    regions, count = _regions(masks)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    # What each damaged pixel adds to the overlap; sound ones add to the false positives.
    gain = np.where(masks, 1.0 / (count * sizes[regions]), 0.0).ravel()
    order = np.argsort(-maps, axis=None, kind="stable")
    scores, gain = maps.ravel()[order], gain[order]
    last = np.append(np.flatnonzero(np.diff(scores)), scores.size - 1)  # of pixels that tie
    overlap = np.insert(np.cumsum(gain)[last], 0, 0.0)
    sound = np.cumsum(~masks.ravel()[order])
    rate = np.insert(sound[last] / sound[-1], 0, 0.0)
    # Where the curve rises at the limit itself, its lower end counts.
    end = np.searchsorted(rate, limit)
    at_limit = np.interp(limit, rate[end - 1 : end + 1], overlap[end - 1 : end + 1])
    rates = np.append(rate[:end], limit)
    overlaps = np.append(overlap[:end], at_limit)
    return float(np.trapezoid(overlaps, rates) / limit)


def region_recall(maps: Array, masks: Array, threshold: float | None) -> float:
    """Return the share of a damaged region that is flagged, averaged over all images' regions.

    At a detector's threshold, this is how much of the damage shows at the promised false alarm
    rate.

    Args:
        maps: Scores of pixels, float `(N, H, W)`: see `at_size`.
        masks: True where there is damage, bool `(N, H, W)`.
        threshold: Score above which a pixel is flagged: `Detector.threshold`.

    Returns:
        Python float in 0-1.

    Raises:
        ValueError: As for `pixel_auroc`, and if the threshold is None.

    Example:
    >>> sddns_tf.metrics.region_recall(maps, masks, detector.threshold)
    """
    maps, masks = _pixels(maps, masks)
    if threshold is None:
        raise ValueError("`threshold` must be a number. Received: None: nothing is ever flagged")
    regions, count = _regions(masks)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    found = np.bincount(regions[maps > threshold].ravel(), minlength=count + 1)[1:]
    return float(np.mean(found / sizes))


def _pixels(maps, masks):
    """Return scores of pixels and which of them are damaged, checked."""
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != bool:
        raise ValueError(
            "`maps` must have shape (N, H, W) and `masks` be bool of the same shape; bring maps to "
            "the size of masks with `at_size`. "
            f"Received: maps of {maps.shape}, masks of {masks.shape} and {masks.dtype}"
        )
    if not np.isfinite(maps).all():
        raise ValueError(
            f"`maps` must be finite. Received: {np.count_nonzero(~np.isfinite(maps))} that are not"
        )
    if masks.all() or not masks.any():
        raise ValueError(
            "`masks` must hold damaged and sound pixels. "
            f"Received: {np.count_nonzero(masks)} of {masks.size} damaged"
        )
    return maps, masks


def _regions(masks):
    """Return connected regions numbered from 1, 0 elsewhere, `(N, H, W)`; and their number."""
    from scipy.ndimage import label

    around = np.zeros((3, 3, 3), bool)
    around[1] = True  # Within an image, diagonals included.
    return label(masks, around)


def knn_accuracy(
    bank_features: Array,
    bank_labels: Array,
    features: Array,
    labels: Array,
    k: int = 20,
    temperature: float = 0.04,
) -> float:
    """Compute the accuracy of the weighted nearest-neighbor classifier of DINO.

    A check of the features wherever labels exist, with nothing to train. Each of the `k` bank
    images nearest by cosine votes for its label with weight `exp(cos / temperature)`; the label
    with the most votes is predicted (in a tie, the smallest). Features need not be normalized.
    Images are compared with the bank block by block, so memory stays bounded.

    Args:
        bank_features: Features with known labels, `(M, D)`, any float dtype.
        bank_labels: Their labels, integers `(M,)`.
        features: Features to classify, `(B, D)`.
        labels: Their true labels, integers `(B,)`. One that the bank lacks counts as a miss.
        k: Number of neighbors that vote, from 1 to M.
        temperature: Positive; the lower, the more the nearest neighbors weigh.

    Returns:
        Python float, the share of `features` classified correctly.

    Raises:
        ValueError: if shapes or dtypes do not fit, features are not finite, or `k` or
            `temperature` is out of range.

    Example:
    >>> bank = np.eye(3)
    >>> sddns_tf.metrics.knn_accuracy(bank, [0, 1, 2], [[0.9, 0.1, 0.0]], [0], k=2)
    1.0

    Reference:
        - [Wu et al., section 3.4](https://arxiv.org/abs/1805.01978)
        - [Caron et al., DINO](https://arxiv.org/abs/2104.14294)
    """
    bank_features = _unit_rows(bank_features, "bank_features")
    features = _unit_rows(features, "features")
    if features.shape[1] != bank_features.shape[1]:
        raise ValueError(
            "`features` and `bank_features` must have the same width. "
            f"Received: {features.shape[1]} and {bank_features.shape[1]}."
        )
    bank_labels = _labels(bank_labels, len(bank_features), "bank_labels")
    labels = _labels(labels, len(features), "labels")
    if not 1 <= k <= len(bank_features):
        raise ValueError(
            f"`k` must be from 1 to the size of the bank, {len(bank_features)}. Received: {k}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: {temperature}.")

    classes, bank_classes = np.unique(bank_labels, return_inverse=True)
    block = max(1, BLOCK_ELEMENTS // max(len(bank_features), len(classes)))
    correct = 0
    for start in range(0, len(features), block):
        cosines = features[start : start + block] @ bank_features.T
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        cosines = np.take_along_axis(cosines, nearest, axis=1).astype("float64")
        # Relative to the largest weight, which keeps the order of votes and cannot overflow.
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature)
        votes = np.zeros((len(cosines), len(classes)))
        np.add.at(votes, (np.arange(len(votes))[:, None], bank_classes[nearest]), weights)
        predicted = classes[votes.argmax(axis=1)]
        correct += int(np.count_nonzero(predicted == labels[start : start + block]))
    return correct / len(features)


def _unit_rows(features, name):
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"`{name}` must have shape (N, D), one feature vector per image. "
            f"Received: shape {features.shape}."
        )
    features = features.astype("float32")
    if not np.isfinite(features).all():
        raise ValueError(f"`{name}` must be finite. Received: NaN or infinite values.")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _labels(labels, count, name):
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be integers of shape ({count},), one per feature vector. "
            f"Received: {labels.dtype} of shape {labels.shape}."
        )
    return labels
