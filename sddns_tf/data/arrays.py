"""Images in memory: arrays, lists of arrays and `.npz` files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from sddns_tf import pictures
from sddns_tf.data.pixels import Opened, Shaping, by, to_uint8


def open_npz(path: str, shaping: Shaping) -> Opened:
    """Open the images, and the labels if there are any, of a NumPy archive."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ValueError(f"npz:PATH must be an existing file. Received: npz:{path}")
    # Only the needed arrays are read: an archive may hold gigabytes of something else.
    try:
        if not zipfile.is_zipfile(path):  # Of which NumPy would say to load it unsafely.
            raise ValueError(
                "Expected an archive, as `np.savez` writes. Received: none; `np.save` writes a "
                "single array, for one"
            )
        with np.load(path, allow_pickle=False) as archive:
            candidates = [key for key in archive.files if key != "labels"]
            key = "images" if "images" in candidates else candidates[0] if candidates else ""
            if key != "images" and len(candidates) != 1:
                raise ValueError(
                    f"Expected the array 'images', or only one array. Received: {archive.files}"
                )
            images = archive[key]
            labels = archive["labels"] if "labels" in archive.files else None
    except Exception as error:  # errors of zipfile, pickle and zlib too
        raise ValueError(
            f"npz:PATH must be a NumPy archive of images. Received: npz:{path} ({error})"
        ) from error
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(
            f"npz:{path}: labels must have shape ({len(images)},). Received: {labels.shape}"
        )
    return open_array(images, labels, shaping, f"npz:{path}")


def open_array(
    images: np.ndarray, labels: np.ndarray | None, shaping: Shaping, name: str
) -> Opened:
    """Open an array of images, `(N, H, W)` or `(N, H, W, C)`."""
    if images.ndim == 3 and images.shape[-1] in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (N, H, W) or (N, H, W, C); pass a single image as "
            f"image[None]. Received: {images.shape}"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels. "
            f"Received: {images.shape}"
        )
    images = to_uint8(images, name)
    shape = shaping.final_shape(images.shape[1:3], name)
    with tf.device("CPU:0"):  # the whole set might not fit on a GPU next to the model
        if images.shape[1:] == (*shape, 3):
            images = tf.convert_to_tensor(images)
        else:
            chunks = [images[i : i + 256] for i in range(0, len(images), 256)]
            images = tf.concat([shaping.finish(tf.constant(c), shape) for c in chunks], axis=0)
        labels = None if labels is None else tf.convert_to_tensor(labels)

    def decode(indices):
        example = {"image": tf.gather(images, indices)}
        if labels is not None:
            example["label"] = tf.gather(labels, indices)
        return example

    count = len(images)
    return Opened(tf.data.Dataset.range(count), decode, count, decodes_batches=True)


def open_list(arrays: Sequence[Any], shaping: Shaping, exif_orientation: bool) -> Opened:
    """Open a list of arrays `(H, W)` or `(H, W, C)` and Pillow images of any mode."""
    if not arrays:
        raise ValueError("`source` must hold at least one image. Received: an empty list")
    images: list[np.ndarray] = []
    for i, array in enumerate(arrays):
        name = f"image {i} of the list"
        if isinstance(array, Image.Image):
            array = pictures.pixels(array, exif_orientation)
        array = np.asarray(array)
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"{name} must have shape (H, W) or (H, W, C) with 1, 3 or 4 channels. "
                f"Received: {array.shape}"
            )
        array = to_uint8(array, name)
        size = array.shape[:2]
        if shaping.image_size is None and images and size != images[0].shape[:2]:
            raise ValueError(
                "`image_size` is needed where images differ in size (height x width). Received: "
                f"image 0 of the list is {by(images[0].shape)}, {name} is {by(size)}"
            )
        shape = shaping.final_shape(size, name)
        with tf.device("CPU:0"):
            images.append(shaping.finish(tf.constant(array), shape).numpy())
    return open_array(np.stack(images), None, Shaping(), "the list")
