"""Images from a TFDS data set, a folder, an `.npz` file or memory, as batches of uint8 RGB.

The input pipeline only delivers raw pixels. Everything else (views, shifts, normalization) happens
on the accelerator, a batch at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.data import mvtec
from sddns_tf.data.arrays import open_array, open_list, open_npz
from sddns_tf.data.auxiliary import with_auxiliary
from sddns_tf.data.datasets import open_dataset
from sddns_tf.data.folder import Folder
from sddns_tf.data.pixels import Shaping, name_of
from sddns_tf.data.tfds import open_tfds
from sddns_tf.image_sources import untuned
from sddns_tf.pictures import MAX_PIXELS
from sddns_tf.validation import check_bool, check_choice, check_int

__all__ = ["NoLabelsError", "image_files", "load", "load_arrays", "mvtec", "with_auxiliary"]


class NoLabelsError(ValueError):
    """The source has no labels, and `load_arrays(..., with_labels=True)` asked for them."""


def load(
    source: Any,
    *,
    batch_size: int,
    split: str = "train",
    data_dir: str | None = None,
    exclude_labels: Sequence[str] = (),
    image_size: int | tuple[int, int] | None = None,
    resize: str = "squash",
    exif_orientation: bool = True,
    min_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_error: str = "raise",
    shuffle: bool = False,
    seed: int = 0,
    drop_remainder: bool = False,
    first_batch: int | None = None,
) -> tf.data.Dataset:
    """Turn any source of images into a batched dataset.

    Grayscale and palette images become RGB. An alpha channel is dropped, not composited onto a
    background. 16-bit values are reduced to 8 bits by `value // 257`, whatever range a file uses.
    If a file holds several images, such as an animated GIF, the first one is used. JPEG and PNG are
    decoded by TensorFlow, other formats by Pillow.

    A folder is searched with its subfolders, in the order of the sorted paths. Links to folders are
    not followed and names that start with a dot are skipped. A warning names files that look like
    images of an unsupported format. Every file is decoded once before this function returns, so
    a bad one is found now, not in the middle of an epoch. Labels are dropped; `load_arrays`
    keeps them.

    A small set of files is fastest when held in memory:
    `load(load_arrays("folder:photos", image_size=64), batch_size=128)`.

    Args:
        source: one of
            - `"tfds:NAME"`: a prepared TFDS data set with an `image` feature, such as
              `"tfds:cifar10"`. Nothing is downloaded.
            - `"folder:PATH"`, or a `pathlib.Path` of a folder: JPEG, PNG, BMP, GIF, TIFF and WebP
              files at any depth.
            - `"npz:PATH"`, or a `pathlib.Path` of an `.npz` file: the array `images` of a NumPy
              archive, or its only array.
            - an array `(N, H, W)` or `(N, H, W, C)`, or a list of arrays `(H, W)` or `(H, W, C)`,
              with 1, 3 or 4 channels, of integers or floats in 0-255. A list may also hold Pillow
              images of any mode.
            - a `tf.data.Dataset`, batched or not, of such images, of dictionaries with the key
              `"image"`, or of `(image, label)` pairs. Its first element is read to check it.
        batch_size: int, images per batch.
        split: TFDS split, such as `"train"` or `"train[:10%]"`. A slice is not what comes first
            in the whole split: TFDS reads several files in turns. Take all parts by slices, or
            all from one array. Other sources have no splits.
        data_dir: folder of prepared TFDS data sets. `None` means the environment variable
            `TFDS_DATA_DIR`, then TFDS's own default.
        exclude_labels: names of the classes of a TFDS data set to leave out.
        image_size: int, or `(height, width)`, in pixels. Images of another size are resized to it
            (bicubic, antialiased). Needed if images differ in size.
        resize: how images of another aspect ratio are resized to `image_size`: `"squash"` distorts
            them, `"crop"` first trims two opposite sides equally. Same as `resize` of
            `FeatureExtractor`.
        exif_orientation: bool, whether to rotate a folder's files, and Pillow images, as their
            EXIF data says.
        min_size: int. An image with a shorter side, before resizing, is an error.
        max_pixels: int. A file whose header states more pixels is not decoded. Folders only.
            (Pillow has a limit of its own, `PIL.Image.MAX_IMAGE_PIXELS`.)
        on_error: `"raise"`, or `"skip"` to skip and log the files of a folder that cannot be used.
            `image_files` returns the others.
        shuffle: bool, whether to use a new order in each iteration. All images are permuted,
            except that a TFDS data set or `tf.data.Dataset` of more than 512 MB is shuffled with a
            512 MB buffer.
        seed: int, seed for shuffling. TensorFlow mixes its global seed in, so that a second process
            has the same order only with the same `keras.utils.set_random_seed`.
        drop_remainder: bool, whether to drop a shorter last batch, for which a graph may have to be
            compiled once more.
        first_batch: int. If given, the dataset repeats forever, without breaks between epochs, and
            starts with this batch: the one that a training run stopped after this many steps would
            have seen next. Earlier images are skipped without being decoded.

    Returns:
        A prefetched `tf.data.Dataset` of uint8 `(B, H, W, 3)`.

    Raises:
        ValueError: if the source is missing or empty, or contains something that is not an image;
            the message names it.
        TypeError: if `source` has another type.

    Example:
    ```python
    images = sddns_tf.data.load("folder:photos/good", image_size=64, batch_size=32, shuffle=True)
    images = sddns_tf.data.load(pathlib.Path("photos"), image_size=(48, 64), batch_size=32)
    images = sddns_tf.data.load("tfds:cifar10", split="test", batch_size=128)
    ```
    """
    check_int("batch_size", batch_size)
    check_bool("shuffle", shuffle)
    check_int("seed", seed, low=0)
    check_bool("drop_remainder", drop_remainder)
    if first_batch is not None:
        check_int("first_batch", first_batch, low=0)
    source = _located(source)
    shaping = Shaping(image_size, resize, min_size)
    folder = _folder(source, shaping, max_pixels, on_error, exif_orientation)
    opened = _open(
        source,
        folder,
        shaping,
        exif_orientation,
        split=split,
        data_dir=data_dir,
        exclude_labels=exclude_labels,
        shuffle_files_seed=seed if shuffle else None,
    )
    records = opened.records
    if shuffle:
        records = records.shuffle(opened.shuffle_buffer, seed=seed, reshuffle_each_iteration=True)
    if first_batch is not None:
        records = records.repeat().skip(first_batch * batch_size)
        drop_remainder = True
    dataset = _batched(opened, records, batch_size, drop_remainder)
    if dataset.cardinality() == 0:
        raise ValueError(
            "`batch_size` must be at most the number of images with drop_remainder=True. "
            f"Received: batch_size={batch_size} for {name_of(source)} of "
            f"{int(records.cardinality())} images"
        )
    # With several machines, each takes a part of every batch, instead of a part of the files.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = dataset.map(_image_of).prefetch(tf.data.AUTOTUNE).with_options(options)
    return untuned(dataset)


def load_arrays(
    source: Any,
    *,
    split: str = "train",
    data_dir: str | None = None,
    exclude_labels: Sequence[str] = (),
    image_size: int | tuple[int, int] | None = None,
    resize: str = "squash",
    exif_orientation: bool = True,
    min_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_error: str = "raise",
    limit: int | None = None,
    with_labels: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Read any source of images into one array.

    Args:
        source: as for `load`.
        split: as for `load`.
        data_dir: as for `load`.
        exclude_labels: as for `load`.
        image_size: as for `load`.
        resize: as for `load`.
        exif_orientation: as for `load`.
        min_size: as for `load`.
        max_pixels: as for `load`.
        on_error: as for `load`.
        limit: int, largest number of images to read, in stored order.
        with_labels: bool, whether to return the labels too: the feature `label` of a TFDS data
            set, the array `labels` of an `.npz` file, or those of a `tf.data.Dataset`.

    Returns:
        uint8 `(N, H, W, 3)`; with labels, a pair of that and int64 `(N,)`.

    Raises:
        ValueError: as for `load`, and if the source has no labels but they are asked for.
        TypeError: as for `load`.

    Example:
    ```python
    images, labels = sddns_tf.data.load_arrays("tfds:cifar10", split="test", with_labels=True)
    ```
    """
    if limit is not None:
        check_int("limit", limit)
    check_bool("with_labels", with_labels)
    source = _located(source)
    shaping = Shaping(image_size, resize, min_size)
    folder = _folder(source, shaping, max_pixels, on_error, exif_orientation)
    no_labels = f"with_labels=True needs a source with labels. Received: {name_of(source)}"
    if folder is not None and not exclude_labels:
        if with_labels:
            raise NoLabelsError(no_labels)
        return folder.read(limit)[1]
    opened = _open(
        source,
        folder,
        shaping,
        exif_orientation,
        split=split,
        data_dir=data_dir,
        exclude_labels=exclude_labels,
    )
    records = opened.records if limit is None else opened.records.take(limit)
    dataset = untuned(_batched(opened, records, 256, drop_remainder=False).prefetch(2))
    if with_labels and "label" not in dataset.element_spec:
        raise NoLabelsError(no_labels)
    batches = list(dataset.as_numpy_iterator())
    images = np.concatenate([batch["image"] for batch in batches])
    if not with_labels:
        return images
    return images, np.concatenate([batch["label"] for batch in batches]).astype(np.int64)


def image_files(
    folder: str | os.PathLike,
    *,
    exif_orientation: bool = True,
    min_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_error: str = "raise",
    limit: int | None = None,
) -> list[str]:
    """List the image files of a folder in the order in which `load` reads them.

    Args:
        folder: path of the folder, or the source `"folder:PATH"`.
        exif_orientation: as for `load`.
        min_size: as for `load`.
        max_pixels: as for `load`.
        on_error: `"raise"`, or `"skip"` to leave out the files that cannot be used.
        limit: int, largest number of files to list, and to check.

    Returns:
        List of sorted paths. Each file has been decoded once as a check.

    Raises:
        ValueError: if there is no such folder or no usable image in it, or, with
            `on_error="raise"`, if a file cannot be used; the message names it and says why.

    Example:
    ```python
    files = sddns_tf.data.image_files("photos", on_error="skip")
    images = sddns_tf.data.load("folder:photos", image_size=64, batch_size=32, on_error="skip")
    ```
    """
    if limit is not None:
        check_int("limit", limit)
    source = f"folder:{os.fspath(folder).removeprefix('folder:')}"
    opened = _folder(source, Shaping(min_size=min_size), max_pixels, on_error, exif_orientation)
    return [file.path for file in opened.files(limit)]


def _located(source):
    """Return a path as the source string it stands for, and anything else unchanged."""
    if not isinstance(source, os.PathLike):
        return source
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        return f"folder:{path}"
    if path.endswith(".npz"):
        return f"npz:{path}"
    raise ValueError(f"A path must lead to a folder or an .npz file. Received: {path}")


def _folder(source, shaping, max_pixels, on_error, exif_orientation):
    """Return the `Folder` that a source names, or None."""
    check_int("max_pixels", max_pixels)
    check_choice("on_error", on_error, ("raise", "skip"))
    check_bool("exif_orientation", exif_orientation)
    kind, _, path = source.partition(":") if isinstance(source, str) else ("", "", "")
    if kind != "folder" or not path:
        return None
    return Folder(path, shaping, max_pixels, on_error, exif_orientation)


def _open(source, folder, shaping, exif_orientation, *, exclude_labels, **tfds_options):
    kind, _, rest = source.partition(":") if isinstance(source, str) else ("", "", "")
    if isinstance(exclude_labels, str):
        raise ValueError(f"`exclude_labels` must be a list of names. Received: {exclude_labels!r}")
    if exclude_labels and kind != "tfds":
        raise ValueError(f'`exclude_labels` needs a "tfds:" source. Received: {name_of(source)}')

    if isinstance(source, str):
        if not rest or kind not in ("tfds", "folder", "npz"):
            hint = f' (did you mean "folder:{source}"?)' if os.path.isdir(source) else ""
            raise ValueError(
                '`source` must be "tfds:NAME", "folder:PATH" or "npz:PATH". '
                f"Received: {source!r}{hint}"
            )
        if kind == "tfds":
            return open_tfds(rest, shaping, exclude_labels, **tfds_options)
        return folder.open() if folder is not None else open_npz(rest, shaping)
    if isinstance(source, tf.data.Dataset):
        return open_dataset(source, shaping)
    if isinstance(source, (np.ndarray, tf.Tensor)):
        return open_array(np.asarray(source), None, shaping, "the array")
    if isinstance(source, (list, tuple)):
        return open_list(source, shaping, exif_orientation)
    raise TypeError(
        "`source` must be a string, a path, an array, a list of images or a tf.data.Dataset. "
        f"Received: {type(source).__name__}"
    )


def _batched(opened, records, batch_size, drop_remainder):
    if opened.decodes_batches:
        records = records.batch(batch_size, drop_remainder=drop_remainder)
        return records.map(opened.decode, num_parallel_calls=tf.data.AUTOTUNE)
    examples = records.map(opened.decode, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size, drop_remainder=drop_remainder)


def _image_of(example):
    return example["image"]
