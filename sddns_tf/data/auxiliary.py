"""Pair batches of in-distribution images with batches of auxiliary images."""

from __future__ import annotations

import tensorflow as tf

from sddns_tf.data.pixels import resized
from sddns_tf.image_sources import image_source
from sddns_tf.types import Array

_EMPTY = "{} must hold at least one batch. Received: an empty dataset"


def with_auxiliary(images: Array, auxiliary: Array | None) -> tf.data.Dataset:
    """Pair batches of in-distribution images with batches of auxiliary images.

    The auxiliary images are repeated as needed and regrouped into batches of the same size as those
    of `images`, including a shorter last one. They are resized to the resolution of `images`, so
    that a network cannot tell the two apart by their resolution.

    Args:
        images: `tf.data.Dataset` of uint8 or float `(B, H, W, 3)` in 0-255. If the batch size is
            not static (it is with `drop_remainder=True`), the first batch is read to find it, and
            no later batch may be larger.
        auxiliary: the same, with any batch size and resolution.

    Returns:
        A `tf.data.Dataset` of `{"images": (B, H, W, 3), "auxiliary": (B, H, W, 3)}` with as many
        batches as `images`.

    Raises:
        TypeError: if an argument is not a `tf.data.Dataset`.
        ValueError: if an argument is empty or yields something other than image batches.
            Invalid auxiliary images may surface only while the dataset runs, as a
            `tf.errors.InvalidArgumentError`.

    Example:
    ```python
    images = sddns_tf.data.load("folder:photos/good", image_size=64, batch_size=32, shuffle=True)
    auxiliary = sddns_tf.data.load("tfds:imagenette", batch_size=32, shuffle=True, image_size=64)
    model.fit(sddns_tf.data.with_auxiliary(images, auxiliary), epochs=100)
    ```
    """
    images = _checked_batches("images", images)
    auxiliary = _checked_batches("auxiliary", auxiliary)
    batch_size = images.element_spec.shape[0]
    if batch_size is None:
        batch_size = next((len(batch) for batch in images.take(1)), 0)
    if batch_size == 0:
        raise ValueError(_EMPTY.format("images"))

    def join(image_batch, auxiliary_batch):
        tf.debugging.assert_less_equal(
            tf.shape(image_batch)[0],
            batch_size,
            f"images: expected no batch larger than the first, of {batch_size} images.",
        )
        auxiliary_batch = auxiliary_batch[: tf.shape(image_batch)[0]]
        size = image_batch.shape[1:3]
        size = size if size.is_fully_defined() else tf.shape(image_batch)[1:3]
        auxiliary_batch = tf.ensure_shape(resized(auxiliary_batch, size), image_batch.shape)
        return {"images": image_batch, "auxiliary": auxiliary_batch}

    side, other = (one.element_spec.shape[1:3] for one in (images, auxiliary))
    if side.is_fully_defined() and not other.is_fully_defined():
        # Batches of several sizes can be joined only then.
        auxiliary = auxiliary.map(lambda batch: resized(batch, side), tf.data.AUTOTUNE)
    # Reading a first batch here, as a check, would fill the shuffle buffer.
    repeated = auxiliary.repeat().concatenate(_complaint(auxiliary.element_spec))
    repeated = repeated.rebatch(batch_size, drop_remainder=True)
    joined = tf.data.Dataset.zip(images, repeated).map(join, num_parallel_calls=tf.data.AUTOTUNE)
    cardinality = images.cardinality()
    if cardinality != tf.data.UNKNOWN_CARDINALITY:
        joined = joined.apply(tf.data.experimental.assert_cardinality(cardinality))
    return joined.prefetch(tf.data.AUTOTUNE)


def _checked_batches(name, dataset):
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            f"{name} must be a batched tf.data.Dataset; `sddns_tf.data.load(array, "
            f"batch_size=...)` makes one from an array. Received: {type(dataset).__name__}"
        )
    if not isinstance(dataset.element_spec, tf.TensorSpec):
        raise ValueError(
            f"{name} must yield batches of images alone. `sddns_tf.data.load(dataset, "
            f"batch_size=...)` converts other datasets. Received: elements {dataset.element_spec}"
        )
    if dataset.cardinality() == 0:
        raise ValueError(_EMPTY.format(name))
    return image_source(dataset, name)


def _complaint(spec):
    """Return a dataset that fails. It follows a repeated one, which ends only if it is empty."""

    def fail(_):
        with tf.control_dependencies([tf.debugging.Assert(False, [_EMPTY.format("auxiliary")])]):
            return tf.zeros([side or 1 for side in spec.shape], spec.dtype)

    return tf.data.Dataset.range(1).map(fail)
