"""Checks whatever Keras takes as images: arrays at once, batches as they come."""

from __future__ import annotations

import collections.abc
import functools
import types
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from sddns_tf.types import Array
from sddns_tf.validation import check_form, check_int, image_array, out_of_range, warn_of_black


def image_source(x: Any, name: str = "x", *, trains: bool = False, allow_nan: bool = False) -> Any:
    """Return a whole set of images in a form Keras takes, checked by the rule of `image_array`.

    Sources of batches are checked batch by batch as they run; a `tf.data.Dataset` of uint8 needs no
    such check and costs nothing.

    Args:
        x: Images as for `image_array`, or batches of them: a `tf.data.Dataset`, an iterator
            (such as a generator) or a `keras.utils.PyDataset`.
        name: What error messages call it.
        trains: Whether images may come with auxiliary ones, as a dictionary with the keys
            `"images"` and `"auxiliary"`, and labels are refused. Otherwise whatever follows the
            images in a batch is ignored.
        allow_nan: Whether floats may be NaN.

    Returns:
        An array, a dictionary of arrays, a `tf.data.Dataset`, an iterator over tuples, or a
        `keras.utils.PyDataset`.

    Raises:
        ValueError: If `x` is none of these, or what can be checked now is not images. Later batches
            raise during the run, those of a dataset a `tf.errors.InvalidArgumentError`.
    """
    check = functools.partial(_checked_batch, name=name, trains=trains, allow_nan=allow_nan)
    if isinstance(x, tf.data.Dataset):
        return _checked_dataset(x, name, trains, allow_nan)
    if isinstance(x, (tf.distribute.DistributedDataset, tf.distribute.DistributedIterator)):
        return x
    if isinstance(x, keras.utils.PyDataset):
        return _CheckedPyDataset(x, check)
    if isinstance(x, collections.abc.Iterator):
        return (check(batch) for batch in x)  # Keras takes generators, not other iterators.
    if isinstance(x, dict) and trains:
        return _checked_dict(x, name, allow_nan)
    if isinstance(x, tuple) and x and trains and len(getattr(x[0], "shape", ())) == 4:
        _check_no_labels(x, name)
        x = x[0]
    if isinstance(x, (list, tuple, Image.Image)) or hasattr(x, "shape"):
        return image_array(x, name, allow_nan=allow_nan)
    raise ValueError(
        f"`{name}` must be images, an array or a list, or batches of images: a tf.data.Dataset, an "
        f"iterator or a keras.utils.PyDataset. Received: {type(x).__name__}"
    )


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return a `tf.data.Dataset` whose end does not wait for the thread that tunes it.

    That thread sleeps twice as long each time, up to a minute. On one core, and often on two busy
    ones, it misses the signal to stop, and whoever reads the last batch waits until it wakes up.
    Without it, `AUTOTUNE` means one thread for each core.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def batches_of(images: Array, batch_size: int) -> tf.data.Dataset:
    """Return the batches of an array, in order, as a `tf.data.Dataset` that is not tuned."""
    check_int("batch_size", batch_size)
    with tf.device("CPU:0"):  # A GPU would hold all of them.
        images = tf.convert_to_tensor(images)
    starts = tf.data.Dataset.range(0, len(images), batch_size)
    batches = starts.map(lambda start: images[start : start + batch_size])
    return untuned(batches.prefetch(2))


def image_batch(x: Any, name: str = "x") -> Any:
    """Return one batch to train on: images, or a dictionary of images and auxiliary ones."""
    return _checked_batch(x, name, trains=True, allow_nan=False)[0]


def validation_source(validation_data: Any) -> Any:
    """Return the `validation_data` of `fit`, checked: like its `x`, or a tuple of only that."""
    parts = validation_data
    is_tuple = isinstance(parts, tuple) and len(parts) in (1, 2, 3)
    is_image = is_tuple and (
        isinstance(parts[0], Image.Image) or len(getattr(parts[0], "shape", ())) == 3
    )
    if is_tuple and not is_image:
        _check_no_labels(parts, "validation_data")
        validation_data = parts[0]
    return image_source(validation_data, "validation_data", trains=True)


def can_be_shuffled(source: Any) -> bool:
    """Return whether Keras can shuffle images. It warns if not, though nobody asked it to."""
    if isinstance(source, keras.utils.PyDataset):
        return source.num_batches is not None
    in_order = (
        tf.data.Dataset,
        tf.distribute.DistributedDataset,
        tf.distribute.DistributedIterator,
        types.GeneratorType,
    )
    return not isinstance(source, in_order)


class _CheckedPyDataset(keras.utils.PyDataset):
    """Batches of a `PyDataset`, each checked."""

    def __init__(self, batches, check):
        super().__init__(
            workers=batches.workers,
            use_multiprocessing=batches.use_multiprocessing,
            max_queue_size=batches.max_queue_size,
        )
        self._batches = batches
        self._check = check

    def __getitem__(self, index):
        return self._check(self._batches[index])

    @property
    def num_batches(self):
        return self._batches.num_batches

    def on_epoch_begin(self):
        self._batches.on_epoch_begin()

    def on_epoch_end(self):
        self._batches.on_epoch_end()


def _checked_batch(batch, name, trains, allow_nan):
    """Return a batch as a tuple of one part, as Keras expects."""
    if isinstance(batch, tuple):
        if trains:
            _check_no_labels(batch, name)
        batch = batch[0]
    if isinstance(batch, dict) and trains:
        return (_checked_dict(batch, name, allow_nan),)
    return (image_array(batch, name, allow_nan=allow_nan),)


def _checked_dict(parts, name, allow_nan):
    """Return arrays of images and auxiliary images, the latter repeated to the same number."""
    _check_keys(parts, name)
    parts = {
        key: image_array(part, f"{name}['{key}']", allow_nan=allow_nan)
        for key, part in parts.items()
    }
    if "auxiliary" in parts:
        count, auxiliary = len(parts["images"]), parts["auxiliary"]
        if len(auxiliary) > count:
            raise ValueError(
                f"`{name}` has more auxiliary images than images: the rest would never be seen. "
                "`sddns_tf.data.with_auxiliary` pairs two datasets of any lengths. Received: "
                f"{count} images, {len(auxiliary)} auxiliary"
            )
        if len(auxiliary) < count:
            parts["auxiliary"] = auxiliary[np.arange(count) % len(auxiliary)]
    return parts


def _checked_dataset(dataset, name, trains, allow_nan):
    spec = dataset.element_spec
    is_tuple = isinstance(spec, tuple) and len(spec) > 0
    if is_tuple and trains:
        _check_no_labels(spec, name)
    first = spec[0] if is_tuple else spec
    if isinstance(first, dict) and trains:
        _check_keys(first, name)
        specs = {f"{name}['{key}']": part for key, part in first.items()}
    else:
        specs = {name: first}
    if int(dataset.cardinality()) == 0:
        raise ValueError(
            f"`{name}` has no batches. A dataset that drops the remainder has none if there are "
            "fewer images than a batch takes. Received: a tf.data.Dataset without elements"
        )
    for key, part in specs.items():
        if not isinstance(part, tf.TensorSpec):
            raise ValueError(
                f"`{name}` must be a dataset of batches of images"
                f"{', or of dictionaries with images and auxiliary' if trains else ''}. "
                f"Received: elements {spec}"
            )
        check_form(part, key)

    def checked(*element):
        first = element[0]
        if isinstance(first, dict):
            return {
                key: in_range_later(part, f"{name}['{key}']", allow_nan)
                for key, part in first.items()
            }
        return in_range_later(first, name, allow_nan)

    if not is_tuple and all(part.dtype == tf.uint8 for part in specs.values()):
        return dataset
    return dataset.map(checked, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _check_no_labels(parts, name):
    if any(part is not None and not isinstance(part, tf.NoneTensorSpec) for part in parts[1:]):
        raise ValueError(
            "SelfDistillation trains without labels: pass images alone. "
            f"Received: {len(parts)} parts in `{name}`"
        )


def _check_keys(parts, name):
    if "images" not in parts or not set(parts) <= {"images", "auxiliary"}:
        raise ValueError(
            f"`{name}` must have the key 'images' and, where negatives need them, 'auxiliary'. "
            f"Received: the keys {sorted(parts, key=str)}"
        )


def in_range_later(images: tf.Tensor, name: str, allow_nan: bool = False) -> tf.Tensor:
    """Like `validation.in_range`, but as part of the graph that yields the images.

    Args:
        images: Tensor of integers or floats; uint8 costs nothing.
        name: What error messages call them.
        allow_nan: Whether floats may be NaN.

    Returns:
        The tensor, integers as uint8. Bad values raise a `tf.errors.InvalidArgumentError`.
    """
    if images.dtype == tf.uint8:
        return images
    values = tf.cast(images, tf.float32)
    numbers = tf.boolean_mask(values, ~tf.math.is_nan(values)) if allow_nan else values
    low, high = tf.reduce_min(numbers), tf.reduce_max(numbers)
    good = tf.reduce_all((numbers >= 0.0) & (numbers <= 255.0))  # NaN is neither.
    text = out_of_range(name, 0, 0).partition(" Received")[0]
    with tf.control_dependencies([tf.debugging.Assert(good, [text, "Received:", low, "to", high])]):
        if not images.dtype.is_floating:
            return tf.cast(images, tf.uint8)
        is_dark = (high > 0.0) & (high <= 1.0)

    def warn(low, high):
        warn_of_black(name, low, high)
        return np.True_

    told = tf.cond(
        is_dark, lambda: tf.numpy_function(warn, [low, high], tf.bool), lambda: tf.constant(True)
    )
    with tf.control_dependencies([told]):
        return tf.identity(images)
