"""Images from a TFDS data set, a folder, an `.npz` file or memory, as batches of uint8 RGB.

Everything downstream (views, shifts, normalization) happens on the accelerator, a batch at a time,
so all that is left to the input pipeline is to hand over raw pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.data.arrays import open_array, open_list, open_npz
from sddns_tf.data.datasets import open_dataset
from sddns_tf.data.folder import MAX_PIXELS, Folder
from sddns_tf.data.pixels import Shaping, name_of, resized
from sddns_tf.data.tfds import open_tfds
from sddns_tf.image_sources import image_source
from sddns_tf.types import Array
from sddns_tf.validation import check_bool, check_choice, check_int

__all__ = ["image_files", "load", "load_arrays", "with_auxiliary"]

_EMPTY = "{} must hold at least one batch. Received: an empty dataset"


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

    Gray images and palettes become RGB; an alpha channel is dropped (nothing is composited on a
    background). 16-bit values become 8-bit ones by `value // 257`, whatever range a file uses. Of a
    file with several images, such as an animated GIF, the first one is taken. JPEG and PNG are
    decoded by TensorFlow, the rest by Pillow.

    In a folder, sub-folders are searched (links to folders are not followed), names that start with
    a dot are passed over, files that look like images of other kinds are named in a warning, and
    the order is that of the sorted paths. Every file of a folder is decoded once before this
    function returns, so that a bad one is found now and not in the middle of an epoch. Labels are
    dropped; see `load_arrays`.

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
              with 1, 3 or 4 channels, of integers or floats in 0-255. A list may hold Pillow's
              pictures of any mode.
            - a `tf.data.Dataset`, batched or not, of such images, of dictionaries with the key
              `"image"`, or of `(image, label)` pairs. Its first element is looked at.
        batch_size: int, images per batch.
        split: TFDS split, such as `"train"` or `"train[:10%]"`. Other sources have no splits.
        data_dir: folder of prepared TFDS data sets. `None` means the environment variable
            `TFDS_DATA_DIR`, then TFDS's own default.
        exclude_labels: names of the classes of a TFDS data set to leave out.
        image_size: int, or `(height, width)`, in pixels. Images of another size are resized to it
            (bicubic, antialiased). Needed where sizes differ.
        resize: how images of another shape are brought to `image_size`: `"squash"` changes their
            aspect ratio, `"crop"` first cuts off what is too much at two sides, equally. As the
            `resize` of `FeatureExtractor`.
        exif_orientation: bool, whether files of a folder, and Pillow's pictures, are turned as
            their EXIF data say.
        min_size: int. An image with a shorter side is an error, for instance one smaller than a
            patch. It applies before resizing.
        max_pixels: int. A file whose header announces more pixels is not decoded. Folders only.
            (Pillow has a limit of its own, `PIL.Image.MAX_IMAGE_PIXELS`.)
        on_error: `"raise"`, or `"skip"` to leave out the files of a folder that cannot be used
            and log how many, and which; `image_files` tells which remain.
        shuffle: bool. A new order in each iteration: all images are permuted, except in a TFDS
            data set or `tf.data.Dataset` of more than 512 MB, where a buffer of that size is.
        seed: int, fixes the sequence of orders.
        drop_remainder: bool, whether to leave out a shorter last batch. A distribution strategy
            needs it.
        first_batch: int. The dataset is endless, begins with the batch of this number and cuts
            epochs nowhere: what a run that was stopped after so many steps would have seen next.
            The images before it are passed over without being decoded.

    Returns:
        A prefetched `tf.data.Dataset` of uint8 `(B, H, W, 3)`.

    Raises:
        ValueError: if the source is missing, empty, or holds something that is not an image; the
            message names it.
        TypeError: if `source` is of none of the kinds above.

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
            f"{name_of(source)} has {int(records.cardinality())} images: with drop_remainder=True "
            f"that is no batch at all. Received: batch_size={batch_size}"
        )
    # Several machines: each takes its part of every batch, not of the files.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.map(_image_of).prefetch(tf.data.AUTOTUNE).with_options(options)


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
        source: as for `load`, as are all arguments not named here.
        split: TFDS split.
        data_dir: folder of prepared TFDS data sets.
        exclude_labels: names of the classes of a TFDS data set to leave out.
        image_size: int, or `(height, width)`, to which images are resized.
        resize: `"squash"` or `"crop"`.
        exif_orientation: bool, whether images are turned as their EXIF data say.
        min_size: int, the shortest side allowed.
        max_pixels: int, the most pixels that a file may announce.
        on_error: `"raise"` or `"skip"`.
        limit: int. Only the first `limit` images, in stored order.
        with_labels: bool, whether to return the labels too: the feature `label` of a TFDS data
            set, the array `labels` of an `.npz` file, or those of a `tf.data.Dataset`.

    Returns:
        uint8 `(N, H, W, 3)`; with labels, a pair of that and int64 `(N,)`.

    Raises:
        ValueError: as for `load`, and if labels are asked for where there are none.
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
    no_labels = f"with_labels=True needs labels, and {name_of(source)} has none."
    if folder is not None and not exclude_labels:
        if with_labels:
            raise ValueError(no_labels)
        return folder.read(limit)
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
    dataset = _batched(opened, records, 256, drop_remainder=False).prefetch(2)
    if with_labels and "label" not in dataset.element_spec:
        raise ValueError(no_labels)
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
) -> list[str]:
    """List the image files of a folder that `load` reads, in the order in which it reads them.

    Args:
        folder: path of the folder, or the source `"folder:PATH"`.
        exif_orientation: bool, as for `load`.
        min_size: int, the shortest side allowed.
        max_pixels: int, the most pixels that a file may announce.
        on_error: `"raise"`, or `"skip"` to leave out the files that cannot be used.

    Returns:
        List of paths, sorted. Each was decoded once.

    Raises:
        ValueError: if there is no such folder, no usable image in it, or, with
            `on_error="raise"`, a file that cannot be used; the message names it and says why.

    Example:
    ```python
    files = sddns_tf.data.image_files("photos", on_error="skip")
    images = sddns_tf.data.load("folder:photos", image_size=64, batch_size=32, on_error="skip")
    ```
    """
    source = f"folder:{os.fspath(folder).removeprefix('folder:')}"
    shaping = Shaping(min_size=min_size)
    return [
        file.path
        for file in _folder(source, shaping, max_pixels, on_error, exif_orientation).files()
    ]


def with_auxiliary(images: Array, auxiliary: Array | None) -> tf.data.Dataset:
    """Pair batches of in-distribution images with batches of auxiliary images.

    The auxiliary images are repeated as needed, cut into batches of the size of the images'
    batches (also of a shorter last one), and resized to the images' own resolution, so that
    resolution gives nothing away.

    Args:
        images: `tf.data.Dataset` of uint8 or float `(B, H, W, 3)` in 0-255. Where it does not
            state its batch size (as it does with `drop_remainder=True`), its first batch is
            looked at; no later batch may be larger.
        auxiliary: the same, of any batch size and resolution.

    Returns:
        A `tf.data.Dataset` of `{"images": (B, H, W, 3), "auxiliary": (B, H, W, 3)}` with as many
        batches as `images`.

    Raises:
        TypeError: if one of them is not a `tf.data.Dataset`.
        ValueError: if one of them is empty or yields something other than image batches. That
            auxiliary images are none may turn out only while the dataset runs, as a
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

    # To look for a first batch here would read as much of the set as a shuffle buffer holds.
    repeated = auxiliary.repeat().concatenate(_complaint(auxiliary.element_spec))
    repeated = repeated.rebatch(batch_size, drop_remainder=True)
    joined = tf.data.Dataset.zip(images, repeated).map(join, num_parallel_calls=tf.data.AUTOTUNE)
    cardinality = images.cardinality()
    if cardinality != tf.data.UNKNOWN_CARDINALITY:
        joined = joined.apply(tf.data.experimental.assert_cardinality(cardinality))
    return joined.prefetch(tf.data.AUTOTUNE)


def _located(source):
    """Return a path as the source it stands for; all else as it is."""
    if not isinstance(source, os.PathLike):
        return source
    path = os.path.expanduser(os.fspath(source))
    if os.path.isdir(path):
        return f"folder:{path}"
    if path.endswith(".npz"):
        return f"npz:{path}"
    raise ValueError(f"A path must be one of a folder or of an .npz file. Received: {path}")


def _folder(source, shaping, max_pixels, on_error, exif_orientation):
    """Return the folder that a source names, or None."""
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
        raise ValueError(f"exclude_labels must be a list of names. Received: {exclude_labels!r}")
    if exclude_labels and kind != "tfds":
        raise ValueError(f'exclude_labels needs a "tfds:" source. Received: {name_of(source)}')

    if isinstance(source, str):
        if not rest or kind not in ("tfds", "folder", "npz"):
            raise ValueError(
                'source must be "tfds:NAME", "folder:PATH" or "npz:PATH". Received: '
                f"{source!r}" + (f': is it "folder:{source}"?' if os.path.isdir(source) else ".")
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
        "source must be a string, a path, an array, a list of images or a tf.data.Dataset. "
        f"Received: {type(source).__name__}"
    )


def _batched(opened, records, batch_size, drop_remainder):
    if opened.decodes_batches:
        records = records.batch(batch_size, drop_remainder=drop_remainder)
        return records.map(opened.decode, num_parallel_calls=tf.data.AUTOTUNE)
    examples = records.map(opened.decode, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size, drop_remainder=drop_remainder)


def _checked_batches(name, dataset):
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            f"{name} must be a batched tf.data.Dataset. Received: {type(dataset).__name__}. "
            "`sddns_tf.data.load(array, batch_size=...)` makes one of an array."
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
    """A dataset that comes after an endless one, so that its error is that there is nothing."""

    def fail(_):
        with tf.control_dependencies([tf.debugging.Assert(False, [_EMPTY.format("auxiliary")])]):
            return tf.zeros([side or 1 for side in spec.shape], spec.dtype)

    return tf.data.Dataset.range(1).map(fail)


def _image_of(example):
    return example["image"]
