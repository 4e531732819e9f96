"""Scores to p-values: the conformal rank, and what counts as equal."""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from sddns_tf.types import Array
from sddns_tf.validation import check_number

# How much a cosine of one image may differ with the batch it is in; exports are held to it too.
COSINE_ROUNDING = 4e-6
# The same of a place's similarity to the bank: features are longer than 1 where it is unusual.
PLACE_ROUNDING = 1.6e-5


def rounding(temperature: float, is_local: bool = False) -> float:
    """Tell by how much a score may differ from itself, with the batch it is in or in an export.

    Args:
        temperature: Positive float, of the score: see `bank.ood_score`.
        is_local: Whether it is the score of a place.

    Returns:
        Float: 1e-4 at the temperature 0.04, of a place 4e-4.
    """
    return (PLACE_ROUNDING if is_local else COSINE_ROUNDING) / temperature


def largest_flagged_rank(calibration_size: int, false_positive_rate: float) -> int:
    """Return the largest `1 + #{calibration scores >= score}` whose p-value is within the rate.

    In float32, as the detector's p-values are, so that 5 of 99 + 1 is within 0.05.
    """
    check_number("false_positive_rate", false_positive_rate, above=0.0, below=1.0)
    p_values = np.arange(1, calibration_size + 1, dtype=np.float32) / np.float32(
        calibration_size + 1
    )
    rank = int(np.count_nonzero(p_values <= np.float32(false_positive_rate)))
    if not rank:
        raise ValueError(
            f"A false positive rate of {false_positive_rate} takes at least "
            f"{math.ceil(1.0 / false_positive_rate - 1e-6) - 1} calibration images: with fewer "
            f"nothing would ever be flagged. Received: {calibration_size} calibration images."
        )
    return rank


def snapped(scores: Array, calibration_scores: Array, rounding: float) -> tf.Tensor:
    """Make scores equal to the calibration scores that only rounding sets them apart from.

    The scores of one image differ in their last bits with the size of the batch, the place in it
    and the machine. So a frame that is identical to a calibration frame would count as more
    anomalous than it half the time. Lowering a score to a calibration score raises its p-value, and
    raising it to one leaves its p-value: the promise stays.

    Args:
        scores: Float32 `(B,)`. NaN stays NaN.
        calibration_scores: Float32 `(N,)`.
        rounding: Positive float; what lies at most this much above a calibration score is lowered,
            what else lies at most half as much below one is raised.

    Returns:
        Float32 tensor `(B,)`.
    """
    calibration, column = calibration_scores[tf.newaxis, :], scores[:, tf.newaxis]
    lowest, highest = scores.dtype.min, scores.dtype.max
    below = tf.reduce_max(tf.where(calibration <= column, calibration, lowest), axis=1)
    above = tf.reduce_min(tf.where(calibration >= column, calibration, highest), axis=1)
    raised = tf.where(above - scores <= rounding / 2, above, scores)
    return tf.where(scores - below <= rounding, below, raised)


def lowered(maps: Array, scores: Array) -> tf.Tensor:
    """Return maps that end where the images' scores do, which `snapped` may have lowered.

    So a place lies above the threshold only where its image's score does.

    Args:
        maps: Scores of places, float32 `(B, h, w)`.
        scores: Scores of the images, float32 `(B,)`, at most the maxima of the maps.

    Returns:
        Float32 tensor `(B, h, w)`, whose maxima are `scores`.
    """
    return tf.minimum(maps, scores[:, tf.newaxis, tf.newaxis])


def merged(scores: Array, rounding: float) -> np.ndarray:
    """Sort calibration scores, those that rounding alone may set apart made equal.

    Each is raised to the highest score of its group, by half of `rounding` at most. Raising
    calibration scores raises p-values: the promise stays.

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
