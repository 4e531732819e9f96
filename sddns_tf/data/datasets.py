"""Images from a `tf.data.Dataset`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from sddns_tf.data.pixels import Opened, Shaping, shuffle_buffer, to_uint8
from sddns_tf.image_sources import in_range_later


def open_dataset(dataset: tf.data.Dataset, shaping: Shaping) -> Opened:
    """Open a `tf.data.Dataset` of images, dictionaries or pairs, batched or not."""
    spec = dataset.element_spec
    if isinstance(spec, dict) and "image" in spec:
        keys: list[Any] = [key for key in ("image", "label") if key in spec]
    elif isinstance(spec, tuple) and spec:
        keys = list(range(min(2, len(spec))))
    elif isinstance(spec, tf.TensorSpec):
        keys, spec = [0], (spec,)
    else:
        raise ValueError(
            "dataset must yield images, dictionaries with the key 'image', or (image, label) "
            f"pairs. Received: elements {spec}"
        )
    image, label = spec[keys[0]], spec[keys[-1]] if len(keys) == 2 else None
    _check_image_spec(image)
    is_batched = image.shape.rank == 4
    if label is not None and label.shape.rank != int(is_batched):
        label = None  # per pixel or one-hot: not a class

    def select(*element):
        element = element[0] if isinstance(element[0], dict) else element
        example = {"image": element[keys[0]]}
        return example if label is None else {**example, "label": element[keys[1]]}

    records = dataset.map(select)
    first = next(records.take(1).as_numpy_iterator(), None)
    if first is None:
        raise ValueError("dataset must hold at least one image. Received: an empty dataset")
    to_uint8(first["image"], "dataset's first element")
    if is_batched:
        records = records.unbatch()
    image = records.element_spec["image"]
    shape = shaping.final_shape(image.shape[:2], "the dataset")

    def decode(record):
        pixels = in_range_later(record["image"], "dataset")
        if pixels.dtype != tf.uint8:
            pixels = tf.cast(tf.round(pixels), tf.uint8)
        pixels = pixels[..., None] if pixels.shape.rank == 2 else pixels
        return {**record, "image": shaping.finish(pixels, shape)}

    examples = max(int(dataset.cardinality()), -1) if not is_batched else -1
    return Opened(records, decode, shuffle_buffer(examples, image.shape, image.dtype.size))


def _check_image_spec(spec):
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank not in (2, 3, 4):
        expected = False
    else:
        expected = spec.shape.rank == 2 or spec.shape[-1] in (1, 3, 4)
    if not expected:
        raise ValueError(
            "dataset must yield images (H, W), (H, W, C) or (B, H, W, C) with 1, 3 or 4 channels. "
            f"Received: elements {spec}"
        )
    if not (spec.dtype.is_integer or spec.dtype.is_floating):
        raise ValueError(
            f"dataset must yield integers or floats in 0-255. Received: dtype {spec.dtype.name}"
        )
