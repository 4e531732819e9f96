"""The one rule for images and for arguments, and what is said where it is broken."""

import math
import numbers
import warnings

import numpy as np
import tensorflow as tf


def check_images(images, name="images"):
    """Raise a `ValueError` unless shape and dtype are those of a batch of images.

    Args:
        images: Anything with `shape` and `dtype`: an array, a tensor, a `tf.TensorSpec`.
        name: What the message calls them.
    """
    shape, dtype = tf.TensorShape(images.shape), tf.as_dtype(images.dtype)
    if shape.rank == 4 and shape[3] in (3, None) and (dtype == tf.uint8 or dtype.is_floating):
        return
    hint = " One image takes a batch axis: `image[None]`." if shape.rank == 3 else ""
    raise ValueError(
        f"`{name}` must be uint8 or float in 0-255, of shape (batch, height, width, 3).{hint} "
        f"Received: shape={shape}, dtype={dtype.name}."
    )


def warn_if_nearly_black(images, name="images"):
    """Warn of float images in 0-1, which are taken for images in 0-255.

    Args:
        images: An array `(N, H, W, 3)`, a dictionary of such, or anything else, which passes.
        name: What the message calls them.
    """
    for one in images.values() if isinstance(images, dict) else [images]:
        is_float = isinstance(one, np.ndarray) and np.issubdtype(one.dtype, np.floating)
        if is_float and one.size and 0.0 < np.max(one) <= 1.0:
            warnings.warn(
                f"`{name}` are nearly black: expected values in 0-255, received "
                f"{np.min(one):.3g} to {np.max(one):.3g}. Multiply images in 0-1 by 255.",
                stacklevel=3,
            )


def check_range(batch):
    """Float images that were already scaled to 0-1 or normalised would be scored as black."""
    largest = float(np.max(np.abs(batch), initial=0.0))
    if np.issubdtype(batch.dtype, np.floating) and 0.0 < largest <= 5.0:
        raise ValueError(
            "Images must be in 0-255: they are normalized here, not by the caller. Received float "
            f"images between {float(np.min(batch)):.3g} and {float(np.max(batch)):.3g}."
        )


def check_int(name, value, low=1, high=None):
    """Raise a `ValueError` unless an argument is an int in a range; `True` is none.

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


def check_number(name, value, low=None, high=None, *, above=None):
    """Raise a `ValueError` unless an argument is a finite number in a range.

    Args:
        name: Name of the argument.
        value: What was passed for it.
        low: Smallest value allowed, or None.
        high: Largest value allowed, or None.
        above: Number that the value must exceed, or None.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if (
        is_number
        and math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    ):
        return
    limits = [
        text.format(limit)
        for text, limit in (("at least {}", low), ("above {}", above), ("at most {}", high))
        if limit is not None
    ]
    raise ValueError(
        f"`{name}` must be a number{' ' if limits else ''}{' and '.join(limits)}. "
        f"Received: {name}={value!r}"
    )


def check_choice(name, value, choices):
    """The value of an argument that takes one of a few strings.

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


def check_numbers(name, values, count, low=None, high=None, *, above=None, ascending=False):
    """The numbers of an argument that holds several, as a tuple of floats.

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
        ValueError: If they are not as many, not numbers, or out of range.
    """
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or len(values) != count:
        raise ValueError(f"`{name}` must be {count} numbers. Received: {name}={values!r}")
    for value in values:
        try:
            check_number(name, value, low, high, above=above)
        except ValueError as error:
            limits = str(error).partition("a number")[2].partition(". Received")[0]
            raise ValueError(
                f"`{name}` must be {count} numbers{limits and f', each{limits}'}. "
                f"Received: {name}={values!r}"
            ) from None
    if ascending and list(values) != sorted(values):
        raise ValueError(
            f"`{name}` must be {count} numbers, the smallest first. Received: {name}={values!r}"
        )
    return tuple(float(value) for value in values)


def check_size(name, size):
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
