"""Scores to p-values: the conformal rank, and what counts as equal."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from sddns_tf.types import Array
from sddns_tf.validation import check_number

# How much a cosine of one image may vary with its batch: see `export.verify` for exports.
COSINE_ROUNDING = 4e-6
# The same for standardized features: dividing by small deviations enlarges what was rounded.
STANDARDIZED_ROUNDING = 1.6e-5


def rounding(temperature: float, standardized: bool = False) -> float:
    """Return how much the score of one image may vary with its batch.

    Args:
        temperature: Positive float, temperature of the score: see `bank.ood_score`.
        standardized: Whether features are standardized, as those of places are.

    Returns:
        Float: 1e-4 at a temperature of 0.04, or 4e-4 for standardized features.
    """
    return (STANDARDIZED_ROUNDING if standardized else COSINE_ROUNDING) / temperature


def largest_flagged_rank(calibration_size: int, false_positive_rate: float) -> int:
    """Return the largest `1 + #{calibration scores >= score}` whose p-value is within the rate.

    In float32, like the detector's p-values, so that 5 of 99 + 1 is within 0.05.
    """
    check_number("false_positive_rate", false_positive_rate, above=0.0, below=1.0)

    def is_flagged(rank):
        p_value = np.float32(rank) / np.float32(calibration_size + 1)
        return p_value <= np.float32(false_positive_rate)

    rank = int(false_positive_rate * (calibration_size + 1))  # up to rounding
    while rank < calibration_size and is_flagged(rank + 1):
        rank += 1
    while rank and not is_flagged(rank):
        rank -= 1
    if not rank:
        raise ValueError(
            f"A false positive rate of {false_positive_rate} takes at least "
            f"{math.ceil(1.0 / false_positive_rate - 1e-6) - 1} calibration images: with fewer "
            f"nothing would ever be flagged. Received: {calibration_size} calibration images."
        )
    return rank


def snapped(scores: Array, calibration_scores: Array, rounding: float) -> tf.Tensor:
    """Set scores to the calibration scores that they differ from by rounding alone.

    The last bits of an image's score depend on the size of the batch, the place in it and the
    machine. So a frame identical to a calibration frame would count as more anomalous than it half
    the time. Lowering a score to a calibration score raises its p-value, and raising it to one
    leaves its p-value as it is: the promise still holds.

    Args:
        scores: Float32 `(B,)`. NaN stays NaN.
        calibration_scores: Float32 `(N,)`.
        rounding: Positive float. Scores at most this far above a calibration score are lowered to
            it; others at most half as far below one are raised to it.

    Returns:
        Float32 tensor `(B,)`.
    """
    calibration, column = calibration_scores[tf.newaxis, :], scores[:, tf.newaxis]
    lowest, highest = -math.inf, math.inf
    below = tf.reduce_max(tf.where(calibration <= column, calibration, lowest), axis=1)
    above = tf.reduce_min(tf.where(calibration >= column, calibration, highest), axis=1)
    raised = tf.where(above - scores <= rounding / 2, above, scores)
    return tf.where(scores - below <= rounding, below, raised)


def ending_at(maps: Array, scores: Array) -> tf.Tensor:
    """Return maps whose maxima are the images' scores, which `snapped` may have moved.

    So a place is above the threshold only if its image's score is.

    Args:
        maps: Scores of places, float32 `(B, h, w)`.
        scores: Scores of the images, float32 `(B,)`: the maxima of the maps, up to rounding.

    Returns:
        Float32 tensor `(B, h, w)`, whose maxima are `scores`.
    """
    highest = tf.reduce_max(maps, axis=[1, 2], keepdims=True)
    scores = scores[:, tf.newaxis, tf.newaxis]
    return tf.where(maps >= highest, scores, tf.minimum(maps, scores))


def merged(scores: Array, rounding: float) -> np.ndarray:
    """Sort calibration scores, and make those equal that may differ by rounding alone.

    Each is raised to the highest score of its group, by at most half of `rounding`. Raising
    calibration scores raises p-values: the promise still holds.

    Args:
        scores: Float `(N,)`, in any order.
        rounding: Positive float.

    Returns:
        NumPy float32 `(N,)`.
    """
    scores = np.sort(np.asarray(scores, np.float32))
    for index in range(len(scores) - 2, -1, -1):
        # The one above has been raised to the highest of its group: groups do not chain.
        if scores[index + 1] - scores[index] <= rounding / 2:
            scores[index] = scores[index + 1]
    return scores
