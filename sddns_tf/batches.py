"""What a training batch holds: images, auxiliary images where negatives need them, no labels."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from sddns_tf import replicas, validation


def unpack(data: Any, negatives: Any) -> tuple[tf.Tensor, tf.Tensor | None, replicas.Part]:
    """Take a batch apart, and check it while the training step is traced.

    Args:
        data: What Keras hands to `train_step`: images `(B, H, W, 3)`, or a dictionary of
            `"images"` and `"auxiliary"`.
        negatives: `Negatives` or None.

    Returns:
        Images, auxiliary images or None if negatives need none, and the `Part` of the global batch
        that this replica holds.

    Raises:
        ValueError: If the batch holds labels, or lacks what is needed.
    """
    batch, labels, _ = keras.utils.unpack_x_y_sample_weight(data)
    if labels is not None:
        raise ValueError(
            "SelfDistillation trains without labels: pass images alone. Received: "
            "batches with two or more parts"
        )
    parts: dict[str, Any] = batch if isinstance(batch, dict) else {"images": batch}
    images: Any = parts.get("images")
    auxiliary: Any = parts.get("auxiliary")
    _check_images("images", images)
    part = replicas.part_of(images)
    if negatives is None or not negatives.needs_auxiliary:
        return replicas.at_least_one(images), None, part
    if auxiliary is None:
        raise ValueError(
            f"Negatives with source={negatives.source!r} need auxiliary images: train on "
            "data.with_auxiliary(images, auxiliary), which yields dictionaries with the keys "
            f"'images' and 'auxiliary'. Received: a batch of {_describe(batch)}"
        )
    _check_images("auxiliary", auxiliary)
    if None not in (sizes := (images.shape[0], auxiliary.shape[0])) and sizes[0] != sizes[1]:
        raise ValueError(
            "A batch needs as many auxiliary images as in-distribution images. Received: "
            f"images.shape={images.shape}, auxiliary.shape={auxiliary.shape}"
        )
    return replicas.at_least_one(images), replicas.at_least_one(auxiliary), part


def refuse_labels(**parts: Any) -> None:
    """Raise a `ValueError` if anything but images was passed, such as labels or their weights."""
    for name, value in parts.items():
        if value is not None:
            raise ValueError(
                "SelfDistillation trains without labels, so there are no classes or samples to "
                f"weigh: pass images alone. Received: {name}={_describe(value)}"
            )


def _check_images(name, images):
    if images is None:
        raise ValueError(f"A batch must hold `{name}`. Received: {name}=None")
    validation.check_images(images, name)
    if None in images.shape[1:3]:
        raise ValueError(
            f"`{name}` must all have one size, known before training; resize them first, as "
            f"data.load(..., image_size=...) does. Received: shape {images.shape}"
        )


def _describe(value):
    if isinstance(value, dict):
        return f"dict with keys {sorted(value)}"
    return f"shape {value.shape}, dtype {value.dtype}" if hasattr(value, "shape") else repr(value)
