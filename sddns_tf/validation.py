"""The one rule for images and for arguments, and the messages when it is broken."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from sddns_tf import pictures
from sddns_tf.types import Array

_FORM = "`{name}` must be uint8 or float in 0-255, of shape (batch, height, width, 3)."


def check_images(images: Array, name: str = "images") -> Any:
    """Check the images of a call, and return them: see `image_array` for the rule.

    In a graph, where there are no values, only shape and dtype are checked. NaN is let through: a
    `FeatureExtractor` makes features NaN where images are.

    Args:
        images: Tensor or array `(B, H, W, 3)`.
        name: What error messages call them.

    Returns:
        The images.

    Raises:
        ValueError: If they are no images in 0-255.
    """
    if not tf.is_symbolic_tensor(images) and not isinstance(images, keras.KerasTensor):
        check_form(images, name)
        values = np.asarray(images)
        checked = in_range(values, name, allow_nan=True) if values.size else values
        return images if checked is values else checked
    check_form(images, name)
    if not (images.dtype == "uint8" or tf.as_dtype(images.dtype).is_floating):
        raise ValueError(
            f"{_FORM.format(name=name)} In a graph, cast them to uint8. "
            f"Received: shape={images.shape}, dtype={images.dtype}"
        )
    return images


def image_array(images: Array, name: str = "images", *, allow_nan: bool = False) -> np.ndarray:
    """Return images in memory as one array, by the rule that applies wherever images are taken.

    They have the shape `(N, H, W, 3)`, N at least 1, and lie in 0-255: as uint8, as any other
    integers, which become uint8, or as floats. Floats that are all at most 1 cause a warning. A
    list of images of one size is stacked; Pillow images in it may have any mode.

    Args:
        images: Array, tensor, list or tuple.
        name: What error messages call them.
        allow_nan: Whether floats may be NaN.

    Returns:
        NumPy array `(N, H, W, 3)`, uint8 or float.

    Raises:
        ValueError: If they are no images in 0-255.
    """
    images = _stacked(images, name)
    check_form(images, name)
    if 0 in images.shape:
        raise ValueError(f"At least one image is needed. Received: {name} of shape {images.shape}")
    return in_range(images, name, allow_nan)


def _stacked(images, name):
    """Return an array of images; a list is stacked."""
    if isinstance(images, Image.Image):
        return pictures.pixels(images)
    if not isinstance(images, (list, tuple)):
        return np.asarray(images)
    arrays = [
        pictures.pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
        for image in images
    ]
    shapes = list(dict.fromkeys(array.shape for array in arrays))
    if len(shapes) > 1:
        raise ValueError(
            f"The images of `{name}` must have one size; "
            "`sddns_tf.data.load_arrays(images, image_size=...)` brings them to one. "
            f"Received: shapes {', '.join(map(str, shapes[:3]))}"
        )
    return np.stack(arrays) if arrays else np.zeros((0, 1, 1, 3), np.uint8)


def check_form(images: Array, name: str) -> None:
    """Raise a `ValueError` unless shape and dtype are those of a batch of images.

    Args:
        images: Anything with `shape` and `dtype`: an array, a tensor, a `tf.TensorSpec`.
        name: What the message calls them.
    """
    shape = tf.TensorShape(images.shape)
    if shape.rank == 4 and shape[3] in (3, None) and _is_number(images.dtype):
        return
    hint = " One image takes a batch axis: `image[None]`." if shape.rank == 3 else ""
    if shape.rank in (3, 4) and shape[-1] not in (3, None):
        hint = " `sddns_tf.data.load_arrays` makes RGB of gray images and of an alpha channel."
    dtype = getattr(images.dtype, "name", images.dtype)
    raise ValueError(
        f"{_FORM.format(name=name)}{hint} Received: shape={tuple(shape) if shape.rank else shape}, "
        f"dtype={dtype}"
    )


def _is_number(dtype):
    """Whether images may have a dtype: integers or floats, not booleans, strings or objects."""
    try:
        dtype = tf.as_dtype(dtype)
    except TypeError:
        return False
    return dtype.is_integer or dtype.is_floating


def in_range(values: Any, name: str, allow_nan: bool = False) -> Any:
    """Check that values of images, of any shape, lie in 0-255, and return them.

    Args:
        values: NumPy array of integers or floats, not empty.
        name: What error messages call them.
        allow_nan: Whether floats may be NaN.

    Returns:
        The array; integers as uint8.

    Raises:
        ValueError: If a value lies outside 0-255.
    """
    if values.dtype == np.uint8:
        return values
    is_float = tf.as_dtype(values.dtype).is_floating
    low, high = values.min(), values.max()
    if is_float and allow_nan and np.isnan(low):
        low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)
        if np.isnan(low):
            return values
    if not (low >= 0 and high <= 255):  # Written so that NaN fails.
        raise ValueError(out_of_range(name, low, high))
    if not is_float:
        return values.astype(np.uint8)
    if 0.0 < high <= 1.0:
        warn_of_black(name, low, high)
    return values


def out_of_range(name: str, low: float, high: float) -> str:
    """Return the error message for images that range from `low` to `high`."""
    hint = ""
    if low < 0:
        hint = " Pass pixels: they are normalized here."
    elif high > 4095:
        hint = " Of 16-bit images pass `images // 257`."
    return f"`{name}` must hold values in 0-255.{hint} Received: {low:.6g} to {high:.6g}"


def warn_of_black(name: str, low: float, high: float) -> None:
    """Warn about float images in 0-1, which are taken for images in 0-255."""
    warnings.warn(
        f"`{name}` are nearly black: expected values in 0-255, received {low:.3g} to {high:.3g}. "
        "Multiply images in 0-1 by 255.",
        stacklevel=4,
    )


def check_int(name: str, value: Any, low: int = 1, high: int | None = None) -> None:
    """Raise a `ValueError` unless an argument is an int in a range; `True` is refused.

    Args:
        name: Name of the argument.
        value: What was passed for it.
        low: Smallest value allowed.
        high: Largest value allowed, or None.
    """
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if is_int and value >= low and (high is None or value <= high):
        return
    kind = {0: "an int, 0 or more", 1: "a positive int"}.get(low, f"an int of at least {low}")
    kind = kind if high is None else f"an int from {low} to {high}"
    raise ValueError(f"`{name}` must be {kind}. Received: {name}={value!r}")


def check_bool(name: str, value: Any) -> None:
    """Raise a `ValueError` unless an argument is True or False.

    Args:
        name: Name of the argument.
        value: What was passed for it.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")


def check_number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a `ValueError` unless an argument is a finite number in a range.

    Args:
        name: Name of the argument.
        value: What was passed for it.
        low: Smallest value allowed, or None.
        high: Largest value allowed, or None.
        above: Number that the value must exceed, or None.
        below: Number that the value must stay below, or None.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if (
        is_number
        and math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        return
    limits = _limits(low, high, above, below)
    raise ValueError(
        f"`{name}` must be a {'finite ' * (not limits)}number{limits}. Received: {name}={value!r}"
    )


def _limits(low, high, above=None, below=None):
    """Return the range of a number in words: " from 0 to 1", " of at least 1 and below 2"."""
    if None not in (low, high):
        return f" from {low} to {high}"
    words = [
        text.format(limit)
        for text, limit in (
            ("of at least {}", low),
            ("above {}", above),
            ("of at most {}", high),
            ("below {}", below),
        )
        if limit is not None
    ]
    return " " + " and ".join(words) if words else ""


def check_choice(name: str, value: Any, choices: Any) -> str:
    """Return the value of an argument that takes one of a few strings.

    Args:
        name: Name of the argument.
        value: What was passed for it.
        choices: The strings allowed.

    Returns:
        The value.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}. Received: {name}={value!r}")
    return value


def check_numbers(
    name: str,
    values: Any,
    count: int,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    ascending: bool = False,
) -> tuple[float, ...]:
    """Return the numbers of an argument that holds several, as a tuple of floats.

    Args:
        name: Name of the argument.
        values: What was passed for it.
        count: How many there must be.
        low: Smallest value allowed, or None.
        high: Largest value allowed, or None.
        above: Number that each value must exceed, or None.
        ascending: Whether no number may be smaller than the one before it.

    Returns:
        Tuple of `count` floats.

    Raises:
        ValueError: If there are more or fewer, or they are not numbers or out of range.
    """
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or len(values) != count:
        raise ValueError(f"`{name}` must be {count} numbers. Received: {name}={values!r}")
    for value in values:
        try:
            check_number(name, value, low, high, above=above)
        except ValueError:
            limits = _limits(low, high, above)
            raise ValueError(
                f"`{name}` must be {count} numbers{limits and f', each{limits}'}. "
                f"Received: {name}={values!r}"
            ) from None
    if ascending and list(values) != sorted(values):
        raise ValueError(
            f"`{name}` must be {count} numbers, the smallest first. Received: {name}={values!r}"
        )
    return tuple(float(value) for value in values)


def check_size(name: str, size: Any) -> tuple[int, int]:
    """`32` or `(32, 48)` as a pair of positive ints (height, width).

    Args:
        name: Name of the argument.
        size: What was passed for it.

    Returns:
        Pair of ints.

    Raises:
        ValueError: If it is neither.
    """
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    try:
        for side in pair:
            check_int(name, side)
        height, width = pair
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be a positive int or a pair (height, width) of them. "
            f"Received: {name}={size!r}"
        ) from None
    return int(height), int(width)
