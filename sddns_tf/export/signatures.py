"""The functions behind the signatures of a SavedModel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.export import decode_files
from sddns_tf.export.verify import resolution
from sddns_tf.types import Array

_IMAGES = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")
_IMAGE_BYTES = tf.TensorSpec([None], tf.string, name="image_bytes")
_RATE = tf.TensorSpec([None], tf.float32, name="false_positive_rate")


def signatures(
    detector: Any, max_pixels: int, include_features: bool = False
) -> dict[str, Callable]:
    """Return the functions of a detector by the names of their signatures.

    Args:
        detector: A `Detector`.
        max_pixels: Image files with more pixels are not decoded.
        include_features: Whether answers include the features.

    Returns:
        Dict of `tf.function`s: see `export.saved_model`.
    """
    size = resolution(detector)

    # All signatures call this function, so the network is stored only once.
    @tf.function(input_signature=[tf.TensorSpec([None, *size, 3], tf.float32)], autograph=False)
    def answer_resized(images: Array) -> dict[str, tf.Tensor]:
        features = detector.features(images)
        return {**detector.answer(features), "features": features}

    def answer_all(images: Array) -> dict[str, tf.Tensor]:
        return answer_resized(_resized(detector, images))

    def chosen(answers: dict[str, Array]) -> dict[str, tf.Tensor]:
        return {name: answers[name] for name in answers if include_features or name != "features"}

    def answer(images: Array) -> dict[str, tf.Tensor]:
        return chosen(answer_all(images))

    def answer_bytes(files: Array) -> dict[str, tf.Tensor]:
        images, status = decode_files.decode(files, size, max_pixels, detector.extractor.resize)
        answers = chosen(answer_resized(images))
        return {**_where_decoded(detector, answers, status), "status": status}

    def at_rate(function: Callable) -> Callable:
        return lambda inputs, rate: _at_rate(detector, function(inputs), rate)

    functions = {
        "serving_default": (answer, [_IMAGES]),
        "serving_bytes": (answer_bytes, [_IMAGE_BYTES]),
        "serving_at_rate": (at_rate(answer), [_IMAGES, _RATE]),
        "serving_bytes_at_rate": (at_rate(answer_bytes), [_IMAGE_BYTES, _RATE]),
        "features": (lambda images: {"features": answer_all(images)["features"]}, [_IMAGES]),
    }
    return {
        name: tf.function(function, input_signature=inputs, autograph=False)
        for name, (function, inputs) in functions.items()
    }


def _resized(detector: Any, images: Array) -> tf.Tensor:
    """Resize images to the detector's resolution, unless they have it already."""
    size = resolution(detector)
    fits = tf.reduce_all(tf.shape(images)[1:3] == size)
    resized = tf.cond(
        fits,
        lambda: tf.cast(images, tf.float32),
        lambda: detector.extractor.at_resolution(images),
    )
    return tf.ensure_shape(resized, [None, *size, 3])


def _where_decoded(detector: Any, answers: dict[str, Array], status: Array) -> dict[str, tf.Tensor]:
    """Replace the answers for files that were not decoded with those for a score of NaN."""
    decoded = status == ""
    lowest = np.float32(1.0 / (1.0 + detector.calibration_scores.shape[0]))
    instead = {"ood_score": math.nan, "p_value": lowest, "is_ood": True, "features": math.nan}
    instead["anomaly_map"] = math.nan

    def where_decoded(value: Array, other: Array) -> tf.Tensor:
        return tf.where(tf.reshape(decoded, [-1] + [1] * (value.shape.rank - 1)), value, other)

    return {name: where_decoded(value, instead[name]) for name, value in answers.items()}


def _at_rate(detector: Any, answers: dict[str, Array], rate: Array) -> dict[str, tf.Tensor]:
    """Replace the decisions with those at other false positive rates, one for each image.

    As in `Detector`, p-values are compared by rank, so that rounding has no effect.
    """
    images = tf.size(answers["p_value"])
    shape = tf.debugging.assert_equal(
        tf.size(rate), images, "`false_positive_rate` must hold one number for each image."
    )
    with tf.control_dependencies([shape]):
        rate = tf.identity(rate)
    ranks = detector.calibration_scores.shape[0] + 1
    p_values = np.arange(1, ranks, dtype=np.float32) / np.float32(ranks)
    largest_flagged = tf.searchsorted(p_values, rate, side="right")
    possible = tf.logical_and(rate < 1.0, largest_flagged > 0)  # False for NaN as well.
    rank = tf.cast(tf.round(answers["p_value"] * ranks), tf.int32)
    wrong = f"needs a false_positive_rate of at least 1/{ranks} and below 1"
    status = answers.get("status", tf.fill([images], ""))
    return {
        **answers,
        "is_ood": tf.logical_or(rank <= largest_flagged, ~possible),
        "status": tf.where(tf.logical_or(possible, status != ""), status, wrong),
    }
