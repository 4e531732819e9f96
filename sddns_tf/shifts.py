"""Shifting transformations that turn a view into a negative.

Each is a function `(images, seed) -> images` of a batch of square images `(B, S, S, 3)` of any
number type. It makes one independent draw per image, fixed by the seed and the image's place in the
global batch, on any number of devices. All run in a compiled graph, XLA included.

Reference:
    Rafiee et al., arXiv 2201.06378: shifts that keep low-level statistics and change high-level
    semantics make the best negatives on average.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from sddns_tf.replicas import uniform as uniform
from sddns_tf.types import Array


@keras.saving.register_keras_serializable("sddns_tf")
def identity(images: Array, seed: Array) -> tf.Tensor:
    """Leave images as they are: the auxiliary image itself is the negative. `seed` is not used."""
    del seed
    return images


@keras.saving.register_keras_serializable("sddns_tf")
def rot90(images: Array, seed: Array) -> tf.Tensor:
    """Rotate each image by 90, 180 or 270 degrees, never by 0."""
    _check_squares(images, "rot90")
    turns = _random_integers(tf.shape(images)[0], 3, seed)[:, tf.newaxis, tf.newaxis, tf.newaxis]
    transposed = tf.transpose(images, [0, 2, 1, 3])
    quarter = tf.reverse(transposed, axis=[1])
    half = tf.reverse(images, axis=[1, 2])
    three_quarters = tf.reverse(transposed, axis=[2])
    return tf.where(turns == 0, quarter, tf.where(turns == 1, half, three_quarters))


@keras.saving.register_keras_serializable("sddns_tf")
def rot360(images: Array, seed: Array) -> tf.Tensor:
    """Rotate each image by a uniform angle; bilinear, black outside, size kept."""
    _check_squares(images, "rot360")
    angles = uniform([tf.shape(images)[0]], seed, maxval=2.0 * math.pi)
    return rotate(images, angles)


def rotate(images: Array, angles: Array) -> tf.Tensor:
    """Rotate about the center, counter-clockwise; bilinear, black outside, size kept.

    Args:
        images: Square images `(B, S, S, 3)` of any number type.
        angles: Radians, float `(B,)`.

    Returns:
        Tensor of the shape and dtype of `images`.
    """
    images = tf.convert_to_tensor(images)
    size = images.shape[1]
    offsets = tf.range(size, dtype=tf.float32) - (size - 1) / 2.0
    cos = tf.cos(angles)[:, tf.newaxis, tf.newaxis]
    sin = tf.sin(angles)[:, tf.newaxis, tf.newaxis]
    y, x = offsets[tf.newaxis, :, tf.newaxis], offsets[tf.newaxis, tf.newaxis, :]
    source_x = cos * x - sin * y + (size - 1) / 2.0
    source_y = sin * x + cos * y + (size - 1) / 2.0
    left, top = tf.floor(source_x), tf.floor(source_y)
    pixels = tf.reshape(tf.cast(images, tf.float32), [-1, size * size, images.shape[-1]])
    rotated = tf.zeros_like(pixels)
    for corner_y, corner_x in itertools.product((top, top + 1.0), (left, left + 1.0)):
        weight = (1.0 - tf.abs(source_x - corner_x)) * (1.0 - tf.abs(source_y - corner_y))
        inside = (corner_x >= 0) & (corner_x < size) & (corner_y >= 0) & (corner_y < size)
        weight = tf.where(inside, weight, tf.zeros_like(weight))
        index = tf.cast(tf.where(inside, corner_y * size + corner_x, 0.0), tf.int32)
        corner = tf.gather(pixels, tf.reshape(index, [-1, size * size]), batch_dims=1)
        rotated += tf.reshape(weight, [-1, size * size, 1]) * corner
    if images.dtype.is_integer:
        rotated = tf.round(rotated)
    return tf.cast(tf.reshape(rotated, tf.shape(images)), images.dtype)


@keras.saving.register_keras_serializable("sddns_tf")
def perm4(images: Array, seed: Array) -> tf.Tensor:
    """Put the 2x2 grid of patches in a random order other than the identity."""
    orders = list(itertools.permutations(range(4)))[1:]
    draw = _random_integers(tf.shape(images)[0], len(orders), seed)
    return _reorder_patches(images, tf.gather(tf.constant(orders), draw), "perm4")


@keras.saving.register_keras_serializable("sddns_tf")
def perm16(images: Array, seed: Array) -> tf.Tensor:
    """Put the 4x4 grid of patches in a random order."""
    return _reorder_patches(images, _random_orders(images, 16, seed), "perm16")


@keras.saving.register_keras_serializable("sddns_tf")
def pixel_perm(images: Array, seed: Array) -> tf.Tensor:
    """Put all pixels in one random order, the same for each channel."""
    _check_squares(images, "pixel_perm")
    size = images.shape[1]
    pixels = tf.reshape(images, [-1, size * size, images.shape[-1]])
    order = _random_orders(images, size * size, seed)
    return tf.reshape(tf.gather(pixels, order, batch_dims=1), tf.shape(images))


@keras.saving.register_keras_serializable("sddns_tf")
def cut_paste(images: Array, seed: Array) -> tf.Tensor:
    """Paste a piece of each image elsewhere in it, a little darker or brighter.

    Local damage: the piece has 2 to 15 % of the area and an aspect ratio from 0.3 to 3.3, both
    drawn on a logarithmic scale; brightness and contrast change by up to 10 %. Not among the
    paper's shifts.

    Reference:
        Li et al., "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization",
        CVPR 2021, section 3.
    """
    images = tf.convert_to_tensor(images)
    _check_squares(images, "cut_paste")
    size = images.shape[1]
    draws = uniform([8, tf.shape(images)[0]], seed)
    area = 0.02 * 7.5 ** draws[0]
    aspect = 0.3 * 11.0 ** draws[1]
    height, width = (
        tf.clip_by_value(tf.round(size * tf.sqrt(side)), 1.0, size - 1.0)
        for side in (area * aspect, area / aspect)
    )
    # Where it comes from and where it goes, top and left.
    (from_y, to_y), (from_x, to_x) = (
        [tf.floor(draws[i] * (size - side + 1.0)) for i in places]
        for side, places in ((height, (2, 3)), (width, (4, 5)))
    )
    rows, inside_rows = _pasted(size, from_y, to_y, height)
    columns, inside_columns = _pasted(size, from_x, to_x, width)
    index = rows[:, :, tf.newaxis] * size + columns[:, tf.newaxis, :]
    pixels = tf.reshape(tf.cast(images, tf.float32), [-1, size * size, images.shape[-1]])
    piece = tf.gather(pixels, tf.reshape(index, [-1, size * size]), batch_dims=1)
    contrast, brightness = (0.9 + 0.2 * draws[i][:, tf.newaxis, tf.newaxis] for i in (6, 7))
    mean = tf.reduce_mean(pixels, axis=[1, 2], keepdims=True)
    piece = brightness * (mean + contrast * (piece - mean))
    inside = inside_rows[:, :, tf.newaxis] & inside_columns[:, tf.newaxis, :]
    mixed = tf.where(tf.reshape(inside, [-1, size * size, 1]), piece, pixels)
    if images.dtype.is_integer:
        mixed = tf.clip_by_value(tf.round(mixed), 0.0, 255.0)
    return tf.cast(tf.reshape(mixed, tf.shape(images)), images.dtype)


def _pasted(size, start, end, length):
    """Along one side: where each pixel comes from, int32 `(B, size)`; whether it is pasted."""
    place = tf.range(size, dtype=tf.float32)[tf.newaxis]
    inside = (place >= end[:, tf.newaxis]) & (place < (end + length)[:, tf.newaxis])
    source = tf.where(inside, place + (start - end)[:, tf.newaxis], place)
    return tf.cast(source, tf.int32), inside


_PAPER = (rot90, rot360, perm4, perm16, pixel_perm, identity)
_SHIFTS = {shift.__name__: shift for shift in (*_PAPER, cut_paste)}
NAMES = tuple(shift.__name__ for shift in _PAPER)  # the paper's own
BEYOND_THE_PAPER = tuple(name for name in _SHIFTS if name not in NAMES)

# Into how many patches a side is divided, where it is.
_GRIDS = {"perm4": 2, "perm16": 4}


def get(shift: str | Callable) -> Callable:
    """Return a shift by its name, or the given callable.

    Args:
        shift: One of `shifts.NAMES` or `shifts.BEYOND_THE_PAPER`, or a callable `(images, seed) ->
            images` that keeps the shape `(B, S, S, 3)`; `seed` is an int32 tensor `(2,)`, the same
            on all replicas, for `shifts.uniform` (`tf.random.stateless_uniform` would give the
            images of each replica the same numbers).

    Returns:
        The callable.

    Raises:
        ValueError: If the name is not known.

    Example:
        >>> negatives = shifts.get("rot90")(images, seed=[0, 1])
    """
    if callable(shift):
        return shift
    if shift in _SHIFTS:
        return _SHIFTS[shift]
    raise ValueError(
        f"`shift` must be a callable (images, seed) -> images or one of {tuple(_SHIFTS)}. "
        f"Received: {shift!r}"
    )


def name_of(shift: str | Callable) -> str:
    """Return the name of a shift that is given by its name or as a callable."""
    if isinstance(shift, str):
        return shift
    return getattr(shift, "__name__", type(shift).__name__)


def check_sides(shift: str | Callable, sides: Iterable[int]) -> None:
    """Check that a shift takes the views of a model, before a graph is made of it.

    Args:
        shift: Name or callable. Of a callable that is not in this module nothing is known.
        sides: Sides of the views in pixels.

    Raises:
        ValueError: If one of the sides cannot be divided into the patches of the shift.
    """
    name = name_of(shift)
    grid = _GRIDS.get(name, 1) if get(shift) is _SHIFTS.get(name) else 1
    if wrong := [side for side in sides if side % grid]:
        raise ValueError(
            f"The shift {name!r} takes images with sides divisible by {grid}: choose "
            f"another size of views. Received: views of {wrong[0]} pixels"
        )


def central_squares(images: Array) -> np.ndarray:
    """Return the central square of each image, of the largest side that every shift takes.

    Args:
        images: Array `(B, H, W, 3)`.

    Returns:
        Array `(B, S, S, 3)`; `images` if they are such squares.
    """
    height, width = images.shape[1:3]
    side = min(height, width)
    side -= side % max(_GRIDS.values())
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


def checked(shift: str | Callable, images: Array, shifted: Array) -> tf.Tensor:
    """Return what a shift returned, which must have the shape and type of its input.

    Args:
        shift: The shift, by name or as a callable, for the error.
        images: Its input, `(B, S, S, 3)`.
        shifted: What it returned.

    Returns:
        Tensor.

    Raises:
        ValueError: If it is of another shape or type.
    """
    received = type(shifted).__name__
    if tf.is_tensor(shifted) or hasattr(shifted, "__array__"):
        shifted = tf.convert_to_tensor(shifted)
        if shifted.dtype == images.dtype and images.shape.is_compatible_with(shifted.shape):
            return shifted
        received = f"{shifted.dtype.name} of shape {shifted.shape}"
    raise ValueError(
        f"The shift {name_of(shift)!r} must return images like those it is given: "
        f"{images.dtype.name} in 0-255 of shape {images.shape}. Received: {received}"
    )


def warn_if_not_savable(shift: str | Callable) -> None:
    """Warn if a model that makes its negatives with this shift could not be saved.

    Args:
        shift: Name or callable.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = keras.saving.serialize_keras_object(shift)
            restored = keras.saving.deserialize_keras_object(config)
        savable = isinstance(shift, str) or callable(restored)
    except Exception:
        savable = False
    if not savable:
        warnings.warn(
            f"The shift {name_of(shift)!r} cannot be saved: `model.save` will fail. Write it as a "
            "function of a module, or as a class with `get_config`, and put "
            "`@keras.saving.register_keras_serializable()` in the line above it. "
            f"Received: {shift!r}",
            stacklevel=3,
        )


def _check_squares(images, name):
    grid = _GRIDS.get(name, 1)
    height, width = images.shape[1], images.shape[2]
    if height is None or height != width or height % grid:
        sides = f" with sides divisible by {grid}" if grid > 1 else ""
        raise ValueError(
            f"The shift {name!r} takes square images{sides}, (B, S, S, 3) with a static S. "
            f"Received: images.shape={images.shape}"
        )


def _random_integers(count, maxval, seed):
    return uniform([count], seed, maxval=maxval, dtype=tf.int32)


def _random_orders(images, length, seed):
    """Return independent uniform permutations of `length` items, `(B, length)` int32."""
    keys = uniform([length, tf.shape(images)[0]], seed)
    return tf.argsort(tf.transpose(keys), axis=-1)


def _reorder_patches(images, order, name):
    _check_squares(images, name)
    grid, size, channels = _GRIDS[name], images.shape[1], images.shape[-1]
    side = size // grid
    patches = tf.reshape(images, [-1, grid, side, grid, side, channels])
    patches = tf.reshape(
        tf.transpose(patches, [0, 1, 3, 2, 4, 5]), [-1, grid**2, side, side, channels]
    )
    patches = tf.gather(patches, order, batch_dims=1)
    patches = tf.reshape(patches, [-1, grid, grid, side, side, channels])
    return tf.reshape(tf.transpose(patches, [0, 1, 3, 2, 4, 5]), tf.shape(images))
