"""Free rows in the `.tflite` file of a local detector, to be filled on the device.

They do there what `Detector.extend` does: places of false alarms become rows, and count as normal
from then on. The buffer `extension` of the file holds them, float32 `(room, C + 1)`: the features
of a place and minus half of their squared length. A free row consists of zeros and ends in `FREE`,
so that it is never the nearest.

The converter computes what it can from constants: it would store the lengths of the rows apart from
them, and multiply the rows by the deviations of the channels. Therefore the lengths are in the
rows, and features get a one as their last channel before they are multiplied. What comes out of a
padding the converter leaves alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.export import metadata
from sddns_tf.types import Array
from sddns_tf.validation import check_int

# Far below any product, and finite after division by a temperature. It is multiplied by one only,
# so that nothing becomes NaN where a delegate with float16 makes it infinite.
FREE = -1e30

LABELS = {
    "features": "float32 (B, h, w, C): of each place, as rows of the bank",
    "place_scores": "float32 (B, h, w): score of each place before smoothing",
}


def check_room(detector: Any, room: int) -> None:
    """Raise a `ValueError` unless a detector's file can have so many free rows.

    Args:
        detector: A `Detector`.
        room: Number of rows.
    """
    check_int("extension_room", room, low=0)
    if room and not detector.is_local:
        raise ValueError(
            "`extension_room` is for places of false alarms, and this detector compares whole "
            f"images: make it with `layers`. Received: extension_room={room} without layers"
        )
    if room and detector.k != 1:
        raise ValueError(
            "`extension_room` needs `k=1`: with the nearest row alone, more rows can only lower "
            "scores, so that the calibration still holds. "
            f"Received: extension_room={room}, k={detector.k}"
        )


def placeholders(detector: Any, room: int) -> dict[str, np.ndarray]:
    """Return placeholders for the rows, whose values serve to find their buffers in the file.

    Args:
        detector: A local `Detector`.
        room: Number of rows; without any there are no placeholders.

    Returns:
        Dict of float32 `"extension"` `(room, C + 1)`.
    """
    if not room:
        return {}
    shape = (room, detector.extractor.feature_dim + 1)
    return {"extension": np.random.default_rng(0xE7).uniform(1.0, 2.0, shape).astype(np.float32)}


def scores(detector: Any, features: Array, rows: Array) -> tf.Tensor:
    """Score places by the nearest row of the extension, as `Detector.place_scores` by the bank's.

    Args:
        detector: A local `Detector`.
        features: Maps `(B, h, w, C)`.
        rows: Float32 `(room, C + 1)`, as in the file.

    Returns:
        Float32 `(B, h, w)`. A place whose features are not finite has an infinite score.
    """
    width = detector.extractor.feature_dim
    places = tf.reshape(features, [-1, width])
    products = tf.matmul(
        tf.pad(places, [[0, 0], [0, 1]], constant_values=1.0), rows, transpose_b=True
    )
    half = tf.reduce_sum(tf.square(places), axis=1) / 2.0
    # Half of the squared distance, in units of the score.
    distances = (half - tf.reduce_max(products, axis=1)) * (1.0 / (width * detector.temperature))
    found = tf.reshape(detector.lowest_score + distances, [-1, *detector.extractor.map_size])
    return tf.where(tf.math.is_nan(found), math.inf, found)


def clear(file: Any) -> None:
    """Make all rows free, in place.

    Args:
        file: Bytearray of a described `.tflite` file that was converted with the placeholder.
    """
    room = metadata.description(file)["extension_room"]
    rows = metadata.values(file, "extension").reshape(room, -1)
    rows[:, :-1], rows[:, -1] = 0.0, FREE
    metadata.describe(file, {"extension_rows": 0})
