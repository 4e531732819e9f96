"""Aligned images: each place has its own mean and covariance, which whiten its features."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sddns_tf.local import safe_deviation
from sddns_tf.types import Array

# Added to the variance of each channel, in units of the channel's own over all places: with fewer
# images than channels, some directions do not vary at all. Less was no better on photographs, and
# whitening would enlarge the rounding of exports in 8 bits more.
REGULARIZATION = 0.01
# Each place has a matrix, so many channels take much memory and large files.
_MOST_BYTES = 2**28


@keras.saving.register_keras_serializable("sddns_tf")
class PlaceWhitening(keras.layers.Layer):
    """Whitens the features of each place by the mean and covariance of this place.

    The mean is 0 and nothing is whitened until `assign` is called.

    Args:
        grid: Rows and columns of the maps.
        channels: Number of channels.

    Call arguments:
        maps: Float32 `(B, h, w, C)`.

    Returns:
        Float32 `(B, h, w, C)`. The squared length of a place is its squared Mahalanobis distance.

    Raises:
        ValueError: If the matrices of all places take too much memory.

    Example:
    >>> PlaceWhitening((28, 28), 40)(maps).shape
    TensorShape([8, 28, 28, 40])
    """

    def __init__(self, grid: tuple[int, int], channels: int, **kwargs) -> None:
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False, "trainable": False})
        places = grid[0] * grid[1]
        if (size := places * channels**2 * 4) > _MOST_BYTES:
            raise ValueError(
                f"`aligned=True` keeps a matrix for each place, at most {_MOST_BYTES / 1e6:.0f} MB "
                "in all: name fewer layers, some with fewer channels or a coarser map. Received: "
                f"layers with {grid[0]} x {grid[1]} places of {channels} channels, "
                f"{size / 1e6:,.0f} MB"
            )
        self.grid, self.channels = tuple(grid), channels
        self.mean = self.add_weight(shape=(*grid, channels), initializer="zeros", name="mean")
        identity = keras.ops.tile(keras.ops.eye(channels)[None], [places, 1, 1])
        self.matrices = self.add_weight(
            shape=(places, channels, channels),
            initializer=lambda shape, dtype=None: identity,
            name="matrices",
        )
        self.built = True

    def assign(self, mean: Array, matrices: Array) -> None:
        """Set what whitens, in place.

        Args:
            mean: Float `(h, w, C)`, mean of each place.
            matrices: Float `(h * w, C, C)`, which differences from the mean are multiplied by: a
                square root of each place's inverse covariance.
        """
        self.mean.assign(mean)
        self.matrices.assign(matrices)

    def call(self, maps: Array) -> tf.Tensor:
        """Whiten maps `(B, h, w, C)`."""
        places = tf.reshape(maps - self.mean, [-1, *self.matrices.shape[:2]])
        places = tf.matmul(tf.transpose(places, [1, 0, 2]), self.matrices)
        return tf.reshape(tf.transpose(places, [1, 0, 2]), [-1, *self.mean.shape])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"name": self.name, "grid": self.grid, "channels": self.channels}


class PlaceMoments:
    """Mean and covariance of each place over a stream of maps.

    Args:
        grid: Rows and columns of the maps.
        channels: Number of channels.

    Reference:
        Defard et al., "PaDiM: a patch distribution modeling framework for anomaly detection and
        localization", 2020, section 3.2.
    """

    def __init__(self, grid: tuple[int, int], channels: int) -> None:
        self._shape = (*grid, channels)
        self._count = 0
        self._near: Any = None
        self._sums = np.zeros((grid[0] * grid[1], channels))
        self._products = np.zeros((grid[0] * grid[1], channels, channels))

    def add(self, maps: np.ndarray) -> None:
        """Add maps `(N, h, w, C)`."""
        places = maps.reshape(len(maps), *self._sums.shape).transpose(1, 0, 2)
        if self._near is None:
            # Sums of squares around a value near the mean lose few digits.
            self._near = places.mean(axis=1, keepdims=True)
        places = places - self._near
        self._count += len(maps)
        self._sums += places.sum(axis=1, dtype=np.float64)
        self._products += places.transpose(0, 2, 1) @ places

    def mean(self) -> np.ndarray:
        """Return the mean of each place, float32 `(h, w, C)`."""
        mean = self._near[:, 0] + self._sums / self._count
        return mean.astype(np.float32).reshape(self._shape)

    def matrices(self) -> np.ndarray:
        """Return what whitens each place, float32 `(h * w, C, C)`: see `PlaceWhitening`."""
        offset = self._sums / self._count
        variance = np.diagonal(self._products, axis1=1, axis2=2) / self._count - offset**2
        between = np.var(self._near[:, 0] + offset, axis=0)
        deviation = safe_deviation(np.maximum(variance.mean(axis=0) + between, 0.0))
        found = np.empty(self._products.shape, np.float32)
        # One place after another: all at once would take several times the memory.
        for place, products in enumerate(self._products):
            covariance = products / self._count - np.outer(offset[place], offset[place])
            covariance /= np.outer(deviation, deviation)
            covariance[np.diag_indices_from(covariance)] += REGULARIZATION
            factor = np.linalg.inv(np.linalg.cholesky(covariance))
            found[place] = (factor / deviation).T
        return found
