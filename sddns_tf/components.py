"""Principal components of places: fewer channels to compare."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sddns_tf.types import Array
from sddns_tf.validation import check_int


def check_reducible(components: int | None, local: bool, aligned: bool) -> None:
    """Raise a `ValueError` if there are components, but no maps or aligned ones.

    Args:
        components: Int or None.
        local: Whether places are compared.
        aligned: Whether each place is compared with the same place only.
    """
    if components is not None and (aligned or not local):
        raise ValueError(
            "`components` reduces the channels of places that are not aligned: leave it out, or "
            f"pass `layers` without `aligned=True`. Received: {components=}, {aligned=}"
        )


@keras.saving.register_keras_serializable("sddns_tf")
class PrincipalComponents(keras.layers.Layer):
    """Reduces standardized channels to their principal components and the length of the rest.

    The last output is the length of what the components leave out. So a place that differs from all
    normal ones in a direction in which these do not vary differs in that length. By the triangle
    inequality, distances are at most what they were before, apart from a common factor, which keeps
    the mean square of a channel. Before `assign` the components are the first channels.

    Args:
        channels: Number of channels.
        components: Number of outputs, 2 to `channels - 1`.

    Call arguments:
        maps: Float32 `(B, ..., channels)`, standardized.

    Returns:
        Float32 `(B, ..., components)`.

    Example:
    >>> PrincipalComponents(152, 64)(maps).shape
    TensorShape([8, 28, 28, 64])
    """

    def __init__(self, channels: int, components: int, **kwargs) -> None:
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False, "trainable": False})
        check_int("channels", channels, low=3)
        check_int("components", components, low=2, high=channels - 1)
        self.channels, self.components = channels, components
        self.directions = self.add_weight(
            shape=(channels, components - 1), initializer="identity", name="directions"
        )
        self.built = True

    def assign(self, rows: Array) -> None:
        """Set the components, in place, to those of rows.

        Args:
            rows: Standardized channels of some thousand places, float `(N, channels)`.
        """
        # Their mean is nearly 0, so this is their covariance. With few rows the last directions are
        # arbitrary, and no row has a part along them.
        products = np.asarray(rows, np.float64).T @ rows
        _, directions = np.linalg.eigh(products)  # the largest last
        self.directions.assign(directions[:, : -self.components : -1])

    def call(self, maps: Array) -> tf.Tensor:
        """Reduce maps `(B, ..., channels)`."""
        places = tf.reshape(maps, [-1, self.channels])  # one matrix product, in exports too
        found = tf.matmul(places, self.directions)
        rest = places - tf.matmul(found, self.directions, transpose_b=True)
        length = tf.sqrt(tf.reduce_sum(tf.square(rest), axis=1, keepdims=True))
        reduced = tf.concat([found, length], axis=1) * (self.components / self.channels) ** 0.5
        return tf.reshape(reduced, [-1, *maps.shape[1:-1], self.components])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"name": self.name, "channels": self.channels, "components": self.components}
