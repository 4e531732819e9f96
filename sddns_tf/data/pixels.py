"""What all sources share: uint8 RGB of one size, and how much of it is shuffled at once."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# A shuffle buffer holds the whole of a set up to this size, and a part of a larger one.
_SHUFFLE_BYTES = 512 * 2**20
_UNKNOWN_IMAGE_BYTES = 128 * 2**10


class Opened(NamedTuple):
    """A source ready to be shuffled (cheap records) and then decoded (expensive images)."""

    records: tf.data.Dataset
    decode: Callable  # one record -> {"image": uint8 (H, W, 3), and "label" where there is one}
    shuffle_buffer: int
    decodes_batches: bool = False  # whether `decode` also takes a batch of records


def final_shape(stored, image_size, min_size, name):
    """Returns `(height, width)` of the images to yield."""
    known = [side for side in stored if side is not None]
    if min_size and known and min(known) < min_size:
        raise ValueError(
            f"{name} must hold images of at least min_size={min_size} pixels a side; received "
            f"{by(stored)}."
        )
    if image_size is not None:
        return (image_size, image_size)
    if len(known) < 2:
        raise ValueError(f"image_size is needed: {name} states no fixed size of its images.")
    return tuple(stored)


def finish(images, shape, min_size):
    """Makes uint8 `(..., H, W, C)` RGB of the given height and width."""
    if min_size:
        sides = tf.shape(images)[-3:-1]
        tf.debugging.assert_greater_equal(sides, min_size, f"an image is under {min_size} pixels")
    if images.shape[-1] == 1:
        images = tf.repeat(images, 3, axis=-1)
    return tf.ensure_shape(resize(images[..., :3], shape), (*images.shape[:-3], *shape, 3))


def resize(images, size):
    """Resizes images in 0-255 to `(height, width)`, and keeps their dtype."""
    if not tf.is_tensor(size) and tuple(images.shape[-3:-1]) == tuple(size):
        return images
    resized = tf.image.resize(images, size, method="bicubic", antialias=True)
    resized = tf.clip_by_value(tf.cast(resized, tf.float32), 0.0, 255.0)  # bicubic overshoots
    return tf.cast(tf.round(resized) if images.dtype.is_integer else resized, images.dtype)


def shuffle_buffer(examples, shape, bytes_per_value=1):
    """Returns how many images to hold, given how many there are (-1: unknown) and their shape."""
    image_bytes = np.prod(shape) * bytes_per_value if None not in shape else _UNKNOWN_IMAGE_BYTES
    affordable = max(1, int(_SHUFFLE_BYTES // image_bytes))
    return affordable if examples < 0 else min(examples, affordable)


def is_empty(dataset):
    """Whether a dataset has no elements; its first one is looked at where it does not say."""
    cardinality = dataset.cardinality()
    if cardinality == tf.data.UNKNOWN_CARDINALITY:
        return next(iter(dataset.take(1)), None) is None
    return cardinality == 0


def name_of(source):
    """What an error calls a source."""
    return source if isinstance(source, str) else f"the {type(source).__name__}"


def by(shape):
    """Height and width as text."""
    return f"{shape[0]} x {shape[1]}"


def to_uint8(array, name):
    """An array of integers or floats in 0-255 as uint8."""
    if array.dtype.kind not in "uif":
        raise ValueError(
            f"{name} must hold integers or floats in 0-255; received dtype {array.dtype}."
        )
    if array.size == 0:
        raise ValueError(f"{name} must not be empty; received shape {array.shape}.")
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # written so that NaN fails
        raise ValueError(f"{name} must hold values in 0-255; received {low} to {high}.")
    if array.dtype.kind == "f" and high <= 1:
        warnings.warn(
            f"{name} holds nearly black images: expected values in 0-255, received {low} to "
            f"{high}. Multiply images in 0-1 by 255.",
            stacklevel=2,
        )
    return np.rint(array).astype(np.uint8)
