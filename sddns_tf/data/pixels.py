"""Common to all sources: conversion to uint8 RGB of one size, and the size of shuffle buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from sddns_tf import image_ops
from sddns_tf.types import Array
from sddns_tf.validation import check_choice, check_int, check_size, in_range

# A shuffle buffer holds a whole data set up to this size, and a part of a larger one.
_SHUFFLE_BYTES = 512 * 2**20
_UNKNOWN_IMAGE_BYTES = 128 * 2**10


class Opened(NamedTuple):
    """An opened source: small records to shuffle, and a function that decodes them to images."""

    records: tf.data.Dataset
    decode: Callable  # record -> {"image": uint8 (H, W, 3)} and maybe "label"
    shuffle_buffer: int
    decodes_batches: bool = False  # whether `decode` also takes a batch of records


class Shaping:
    """How images are resized to one size, and how small they may be before that.

    Args:
        image_size: None, an int or (height, width) in pixels.
        resize: `"squash"` or `"crop"`: see `image_ops.fit`.
        min_size: None, or the shortest side allowed.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        resize: str = "squash",
        min_size: int | None = None,
    ) -> None:
        self.image_size = None if image_size is None else check_size("image_size", image_size)
        self.resize = check_choice("resize", resize, image_ops.RESIZES)
        if min_size is not None:
            check_int("min_size", min_size)
        self.min_size = min_size or 1

    def final_shape(self, stored: Sequence[int | None], name: str) -> tuple[Any, ...]:
        """Return the `(height, width)` to yield; `stored` may have sides that are None."""
        known = [side for side in stored if side is not None]
        if known and min(known) < self.min_size:
            raise ValueError(
                f"{name} must hold images of at least min_size={self.min_size} pixels a side. "
                f"Received: {by(stored)}"
            )
        if self.image_size is not None:
            return self.image_size
        if len(known) < 2:
            raise ValueError(
                "`image_size` is needed where the source does not state one size for all images. "
                f"Received: {name}"
            )
        return tuple(stored)

    def finish(self, images: Array, shape: tuple[int, int]) -> tf.Tensor:
        """Convert uint8 `(..., H, W, C)` to RGB of the given height and width."""
        if self.min_size > 1:
            sides = tf.shape(images)[-3:-1]
            tf.debugging.assert_greater_equal(
                sides, self.min_size, f"an image is under {self.min_size} pixels"
            )
        if images.shape[-1] == 1:
            images = tf.repeat(images, 3, axis=-1)
        fitted = resized(images[..., :3], shape, self.resize)
        return tf.ensure_shape(fitted, (*images.shape[:-3], *shape, 3))


def resized(images: Array, size: tuple[int, int], resize: str = "squash") -> tf.Tensor:
    """Resize images in 0-255 as `image_ops.fit` does, and round them to their own dtype.

    Uses TensorFlow's own operation, which needs no float copy of a large photograph.
    """
    if not tf.is_tensor(size) and tuple(images.shape[-3:-1]) == tuple(size):
        return images
    if resize == "crop":
        batch = images if images.shape.rank == 4 else images[tf.newaxis]
        batch = image_ops.center_crop(batch, *size)
        images = batch if images.shape.rank == 4 else batch[0]
    scaled = tf.image.resize(images, size, method="bicubic", antialias=True)
    scaled = tf.clip_by_value(tf.cast(scaled, tf.float32), 0.0, 255.0)  # bicubic overshoots
    return tf.cast(tf.round(scaled) if images.dtype.is_integer else scaled, images.dtype)


def shuffle_buffer(examples: int, shape: Sequence[Any], bytes_per_value: int = 1) -> int:
    """Return the size of a shuffle buffer for a number of images (-1: unknown) of some shape."""
    image_bytes = np.prod(shape) * bytes_per_value if None not in shape else _UNKNOWN_IMAGE_BYTES
    affordable = max(1, int(_SHUFFLE_BYTES // image_bytes))
    return affordable if examples < 0 else min(examples, affordable)


def name_of(source: Any) -> str:
    """Return the name of a source for error messages."""
    return source if isinstance(source, str) else f"the {type(source).__name__}"


def by(shape: Sequence[int | None]) -> str:
    """Return height and width as text."""
    return f"{shape[0]} x {shape[1]}"


def to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array of integers or floats in 0-255 to uint8."""
    if array.dtype.kind not in "uif":
        raise ValueError(
            f"`{name}` must hold integers or floats in 0-255. Received: dtype {array.dtype}"
        )
    if array.size == 0:
        raise ValueError(f"`{name}` must not be empty. Received: shape {array.shape}")
    array = in_range(array, name)
    return array if array.dtype == np.uint8 else np.rint(array).astype(np.uint8)
