"""Images from a TFDS data set, a folder, an `.npz` file or memory, as batches of uint8 RGB.

Everything downstream (views, shifts, normalisation) happens on the accelerator, a batch at a time,
so all that is left to the input pipeline is to hand over raw pixels.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from sddns_tf.image_folder import MAX_PIXELS, usable_files

# A shuffle buffer holds the whole of a set up to this size, and a part of a larger one.
_SHUFFLE_BYTES = 512 * 2**20
_UNKNOWN_IMAGE_BYTES = 128 * 2**10


def load(
    source,
    *,
    batch_size,
    split="train",
    data_dir=None,
    exclude_labels=(),
    image_size=None,
    min_size=None,
    max_pixels=MAX_PIXELS,
    on_error="raise",
    shuffle=False,
    seed=0,
    drop_remainder=False,
    first_batch=None,
):
    """Turns any source of images into a batched dataset.

    Grey images become RGB; an alpha channel is dropped (nothing is composited on a background).
    A JPEG's pixels are taken as stored: its EXIF orientation is ignored. Of a GIF, the first frame
    is taken. In a folder, sub-folders are searched (links to folders are not followed), names that
    start with a dot are passed over, and the order is that of the sorted paths. Every file of a
    folder is decoded once before this function returns, so that a bad one is found now and not in
    the middle of an epoch. Labels are dropped; see `load_arrays`.

    A small set of files is fastest when held in memory:
    `load(load_arrays("folder:photos", image_size=64), batch_size=128)`.

    Args:
        source: one of
            - `"tfds:NAME"`: a prepared TFDS data set with an `image` feature, such as
              `"tfds:cifar10"`. Nothing is downloaded.
            - `"folder:PATH"`: JPEG, PNG, BMP and GIF files at any depth.
            - `"npz:PATH"`: the array `images` of a NumPy archive, or its only array.
            - an array `(N, H, W)` or `(N, H, W, C)`, or a list of arrays `(H, W)` or `(H, W, C)`,
              with 1, 3 or 4 channels, of integers or floats in 0-255.
            - a `tf.data.Dataset`, batched or not, of such images, of dictionaries with the key
              `"image"`, or of `(image, label)` pairs. Its first element is looked at.
        batch_size: int, images per batch.
        split: TFDS split, such as `"train"` or `"train[:10%]"`. Other sources have no splits.
        data_dir: folder of prepared TFDS data sets. `None` means the environment variable
            `TFDS_DATA_DIR`, then TFDS's own default.
        exclude_labels: names of the classes of a TFDS data set to leave out.
        image_size: int. Images of another size are resized to `(image_size, image_size)` (bicubic,
            antialiased, aspect ratio not kept). Needed where sizes differ.
        min_size: int. An image with a shorter side is an error, for instance one smaller than a
            patch. It applies before resizing.
        max_pixels: int. A file whose header announces more pixels is not decoded. Folders only.
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
    images = sddns_tf.data.load("tfds:cifar10", split="test", batch_size=128)
    ```
    """
    _check_positive("batch_size", batch_size)
    if first_batch:
        _check_positive("first_batch", first_batch)
    opened = _open(
        source,
        split=split,
        data_dir=data_dir,
        exclude_labels=exclude_labels,
        image_size=image_size,
        min_size=min_size,
        max_pixels=max_pixels,
        on_error=on_error,
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
            f"{_name(source)} has {int(records.cardinality())} images: with drop_remainder=True "
            f"that is no batch at all; received batch_size={batch_size}."
        )
    # Several machines: each takes its part of every batch, not of the files.
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.map(_image_of).prefetch(tf.data.AUTOTUNE).with_options(options)


def load_arrays(
    source,
    *,
    split="train",
    data_dir=None,
    exclude_labels=(),
    image_size=None,
    min_size=None,
    max_pixels=MAX_PIXELS,
    on_error="raise",
    limit=None,
    with_labels=False,
):
    """Reads any source of images into one array.

    Args:
        source: as for `load`, as are all arguments not named here.
        split: TFDS split.
        data_dir: folder of prepared TFDS data sets.
        exclude_labels: names of the classes of a TFDS data set to leave out.
        image_size: int, the side to which images are resized.
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
        _check_positive("limit", limit)
    opened = _open(
        source,
        split=split,
        data_dir=data_dir,
        exclude_labels=exclude_labels,
        image_size=image_size,
        min_size=min_size,
        max_pixels=max_pixels,
        on_error=on_error,
    )
    records = opened.records if limit is None else opened.records.take(limit)
    dataset = _batched(opened, records, 256, drop_remainder=False).prefetch(2)
    if with_labels and "label" not in dataset.element_spec:
        raise ValueError(f"with_labels=True needs labels, and {_name(source)} has none.")
    batches = list(dataset.as_numpy_iterator())
    images = np.concatenate([batch["image"] for batch in batches])
    if not with_labels:
        return images
    return images, np.concatenate([batch["label"] for batch in batches]).astype(np.int64)


def image_files(folder, *, min_size=None, max_pixels=MAX_PIXELS, on_error="raise"):
    """Lists the image files of a folder that `load` reads, in the order in which it reads them.

    Args:
        folder: path of the folder.
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
    return [path for path, _ in usable_files(folder, min_size, max_pixels, on_error)]


def with_auxiliary(images, auxiliary):
    """Pairs batches of in-distribution images with batches of auxiliary images.

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
        ValueError: if one of them is empty or yields something other than image batches.

    Example:
    ```python
    images = sddns_tf.data.load("folder:photos/good", image_size=64, batch_size=32, shuffle=True)
    auxiliary = sddns_tf.data.load("tfds:imagenette", batch_size=32, shuffle=True, image_size=64)
    model.fit(sddns_tf.data.with_auxiliary(images, auxiliary), epochs=100)
    ```
    """
    for name, dataset in (("images", images), ("auxiliary", auxiliary)):
        _check_image_batches(name, dataset)
    # Repeating an empty dataset would wait for its first element for ever.
    if _is_empty(auxiliary):
        raise ValueError("auxiliary must hold at least one batch; received an empty dataset.")
    batch_size = images.element_spec.shape[0]
    if batch_size is None:
        batch_size = next((len(batch) for batch in images.take(1)), 0)
    if batch_size == 0 or images.cardinality() == 0:
        raise ValueError("images must hold at least one batch; received an empty dataset.")

    def join(image_batch, auxiliary_batch):
        tf.debugging.assert_less_equal(
            tf.shape(image_batch)[0],
            batch_size,
            f"images: expected no batch larger than the first, of {batch_size} images.",
        )
        auxiliary_batch = auxiliary_batch[: tf.shape(image_batch)[0]]
        size = image_batch.shape[1:3]
        size = size if size.is_fully_defined() else tf.shape(image_batch)[1:3]
        auxiliary_batch = tf.ensure_shape(_resize(auxiliary_batch, size), image_batch.shape)
        return {"images": image_batch, "auxiliary": auxiliary_batch}

    repeated = auxiliary.repeat().rebatch(batch_size, drop_remainder=True)
    joined = tf.data.Dataset.zip(images, repeated).map(join, num_parallel_calls=tf.data.AUTOTUNE)
    cardinality = images.cardinality()
    if cardinality != tf.data.UNKNOWN_CARDINALITY:
        joined = joined.apply(tf.data.experimental.assert_cardinality(cardinality))
    return joined.prefetch(tf.data.AUTOTUNE)


class _Opened(NamedTuple):
    """A source ready to be shuffled (cheap records) and then decoded (expensive images)."""

    records: tf.data.Dataset
    decode: Callable  # one record -> {"image": uint8 (H, W, 3), and "label" where there is one}
    shuffle_buffer: int
    decodes_batches: bool = False  # whether `decode` also takes a batch of records


def _open(source, *, image_size, min_size, max_pixels, on_error, exclude_labels, **tfds_options):
    for name, value in (("image_size", image_size), ("min_size", min_size)):
        if value is not None:
            _check_positive(name, value)
    _check_positive("max_pixels", max_pixels)
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip"; received {on_error!r}.')
    kind, _, rest = source.partition(":") if isinstance(source, str) else ("", "", "")
    if isinstance(exclude_labels, str):
        raise ValueError(f"exclude_labels must be a list of names; received {exclude_labels!r}.")
    if exclude_labels and kind != "tfds":
        raise ValueError(f'exclude_labels needs a "tfds:" source; received {_name(source)}.')

    if isinstance(source, str):
        if not rest or kind not in ("tfds", "folder", "npz"):
            raise ValueError(
                'source must be "tfds:NAME", "folder:PATH" or "npz:PATH"; received '
                f"{source!r}" + (f': is it "folder:{source}"?' if os.path.isdir(source) else ".")
            )
        if kind == "tfds":
            return _open_tfds(rest, exclude_labels, image_size, min_size, **tfds_options)
        if kind == "folder":
            return _open_folder(rest, image_size, min_size, max_pixels, on_error)
        return _open_npz(rest, image_size, min_size)
    if isinstance(source, tf.data.Dataset):
        return _open_dataset(source, image_size, min_size)
    if isinstance(source, (np.ndarray, tf.Tensor)):
        return _open_array(np.asarray(source), None, image_size, min_size, "the array")
    if isinstance(source, (list, tuple)):
        return _open_list(source, image_size, min_size)
    raise TypeError(
        "source must be a string, an array, a list of arrays or a tf.data.Dataset; received "
        f"{type(source).__name__}."
    )


def _batched(opened, records, batch_size, drop_remainder):
    if opened.decodes_batches:
        records = records.batch(batch_size, drop_remainder=drop_remainder)
        return records.map(opened.decode, num_parallel_calls=tf.data.AUTOTUNE)
    examples = records.map(opened.decode, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size, drop_remainder=drop_remainder)


# --- TFDS ---------------------------------------------------------------------------------------


def _open_tfds(
    name, exclude_labels, image_size, min_size, split, data_dir, shuffle_files_seed=None
):
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir)
    try:
        examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError):
        raise ValueError(
            f"tfds:{name} has the splits {sorted(builder.info.splits)}; received split={split!r}."
        ) from None
    features = dict(builder.info.features.items())
    image = features.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(
            f"tfds:{name} must have a uint8 image feature named 'image'; received the features "
            f"{sorted(features)}."
        )
    has_label = "label" in features and features["label"].shape == ()
    excluded = _excluded_ids(name, features, exclude_labels)
    shape = _final_shape(image.shape[:2], image_size, min_size, f"tfds:{name}")

    # The stored bytes are shuffled and filtered; only images that are used are decoded.
    wanted = {"image": True, "label": True} if has_label else {"image": True}
    config = tfds.ReadConfig(
        try_autocache=False, skip_prefetch=True, shuffle_seed=shuffle_files_seed
    )
    config.options.deterministic = True
    records = builder.as_dataset(
        split,
        decoders=tfds.decode.PartialDecoding(
            wanted, decoders={"image": tfds.decode.SkipDecoding()}
        ),
        read_config=config,
        shuffle_files=shuffle_files_seed is not None,
    )
    if excluded:
        records = records.filter(lambda record: tf.reduce_all(record["label"] != excluded))
    if _is_empty(records):
        raise ValueError(
            f"tfds:{name} must hold at least one image; split={split!r} has {examples}, and "
            f"exclude_labels={list(exclude_labels)} leaves none."
        )

    def decode(record):
        pixels = tf.io.decode_image(record["image"], channels=3, expand_animations=False)
        return {**record, "image": _finish(pixels, shape, min_size)}

    return _Opened(records, decode, _shuffle_buffer(examples, image.shape))


def _tfds_builder(name, data_dir):
    import tensorflow_datasets as tfds

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    data_dir = os.path.expanduser(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        # TFDS answers an unknown name with all of the thousand that it knows: too long to read.
        reason = str(error).split("\n")[0]
    else:
        if tf.io.gfile.isdir(builder.data_dir):
            return builder
        reason = (
            f"It is not prepared there; `tfds build {name} --data_dir={data_dir}` prepares a data "
            "set that TFDS knows."
        )
    prepared = []
    if tf.io.gfile.isdir(data_dir):
        prepared = sorted(entry.rstrip("/") for entry in tf.io.gfile.listdir(data_dir))
    raise ValueError(
        f"tfds:{name} must be a prepared data set in {data_dir}, which holds {prepared}. {reason}"
    )


def _excluded_ids(name, features, exclude_labels):
    if not exclude_labels:
        return []
    names = getattr(features["label"], "names", None) if "label" in features else None
    if names is None:
        raise ValueError(f"exclude_labels needs named labels, and tfds:{name} has none.")
    unknown = sorted(set(exclude_labels) - set(names))
    if unknown:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(
            f"exclude_labels must be labels of tfds:{name} ({shown}); received {unknown}."
        )
    return [names.index(label) for label in sorted(set(exclude_labels))]


# --- Folder -------------------------------------------------------------------------------------


def _open_folder(folder, image_size, min_size, max_pixels, on_error):
    files = usable_files(folder, min_size, max_pixels, on_error)
    first_path, first_size = files[0]
    for path, size in files:
        if image_size is None and size != first_size:
            raise ValueError(
                "image_size is needed where sizes differ (height x width): "
                f"{first_path} has {_by(first_size)}, {path} has {_by(size)}."
            )
    shape = _final_shape(first_size, image_size, None, folder)

    def decode(path):
        pixels = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return {"image": _finish(pixels, shape, None)}

    # Bytes, because a file name need not be valid Unicode.
    records = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path, _ in files])
    return _Opened(records, decode, shuffle_buffer=len(files))


# --- Memory -------------------------------------------------------------------------------------


def _open_npz(path, image_size, min_size):
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ValueError(f"npz:{path} must be a file; there is none of that name.")
    # Only the wanted arrays are read: an archive may hold gigabytes of something else.
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array (.npy)")
        with archive:
            candidates = [key for key in archive.files if key != "labels"]
            key = "images" if "images" in candidates else candidates[0] if candidates else ""
            if key != "images" and len(candidates) != 1:
                raise ValueError(
                    f"expected the array 'images' or one array, received {archive.files}"
                )
            images = archive[key]
            labels = archive["labels"] if "labels" in archive.files else None
    except Exception as error:  # NumPy lets through whatever zipfile, pickle and zlib raise
        raise ValueError(f"npz:{path} must be a NumPy archive of images: {error}.") from error
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(
            f"npz:{path}: labels must have shape ({len(images)},); received {labels.shape}."
        )
    return _open_array(images, labels, image_size, min_size, f"npz:{path}")


def _open_array(images, labels, image_size, min_size, name):
    if images.ndim == 3 and images.shape[-1] in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (N, H, W) or (N, H, W, C); received {images.shape}, which "
            "looks like one image. Pass image[None]."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels; "
            f"received {images.shape}."
        )
    images = _to_uint8(images, name)
    shape = _final_shape(images.shape[1:3], image_size, min_size, name)
    with tf.device("CPU:0"):  # the whole set would not fit beside the model
        if images.shape[1:] == (*shape, 3):
            images = tf.convert_to_tensor(images)
        else:
            chunks = [images[i : i + 256] for i in range(0, len(images), 256)]
            images = tf.concat([_finish(tf.constant(c), shape, None) for c in chunks], axis=0)
        labels = None if labels is None else tf.convert_to_tensor(labels)

    def decode(indices):
        example = {"image": tf.gather(images, indices)}
        if labels is not None:
            example["label"] = tf.gather(labels, indices)
        return example

    count = len(images)
    return _Opened(tf.data.Dataset.range(count), decode, count, decodes_batches=True)


def _open_list(arrays, image_size, min_size):
    if not arrays:
        raise ValueError("source must hold at least one image; received an empty list.")
    images = []
    for i, array in enumerate(arrays):
        name = f"image {i} of the list"
        array = np.asarray(array)
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
            raise ValueError(
                f"{name} must have shape (H, W) or (H, W, C) with 1, 3 or 4 channels; "
                f"received {array.shape}."
            )
        array = _to_uint8(array, name)
        size = array.shape[:2]
        if image_size is None and images and size != images[0].shape[:2]:
            raise ValueError(
                "image_size is needed where sizes differ (height x width): image 0 of the list "
                f"has {_by(images[0].shape)}, {name} has {_by(size)}."
            )
        shape = _final_shape(size, image_size, min_size, name)
        with tf.device("CPU:0"):
            images.append(_finish(tf.constant(array), shape, None).numpy())
    return _open_array(np.stack(images), None, None, None, "the list")


def _to_uint8(array, name):
    if array.dtype.kind not in "uif":
        raise ValueError(
            f"{name} must hold integers or floats in 0-255; received dtype {array.dtype}."
        )
    if array.size == 0:
        raise ValueError(f"{name} must not be empty; received shape {array.shape}.")
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 255):  # written so that NaN fails
        raise ValueError(f"{name} must hold values in 0-255; received {low} to {high}.")
    if array.dtype.kind == "f" and high <= 1:
        warnings.warn(
            f"{name} holds nearly black images: expected values in 0-255, received {low} to "
            f"{high}. Multiply images in 0-1 by 255.",
            stacklevel=2,
        )
    return np.rint(array).astype(np.uint8)


# --- tf.data ------------------------------------------------------------------------------------


def _open_dataset(dataset, image_size, min_size):
    spec = dataset.element_spec
    if isinstance(spec, dict) and "image" in spec:
        keys = [key for key in ("image", "label") if key in spec]
    elif isinstance(spec, tuple) and spec:
        keys = list(range(min(2, len(spec))))
    elif isinstance(spec, tf.TensorSpec):
        keys, spec = [0], (spec,)
    else:
        raise ValueError(
            "dataset must yield images, dictionaries with the key 'image', or (image, label) "
            f"pairs; received elements {spec}."
        )
    image, label = spec[keys[0]], spec[keys[-1]] if len(keys) == 2 else None
    _check_image_spec(image)
    is_batched = image.shape.rank == 4
    if label is not None and label.shape.rank != int(is_batched):
        label = None  # a label per pixel, or one-hot: of no use as a class

    def select(*element):
        element = element[0] if isinstance(element[0], dict) else element
        example = {"image": element[keys[0]]}
        return example if label is None else {**example, "label": element[keys[1]]}

    records = dataset.map(select)
    first = next(records.take(1).as_numpy_iterator(), None)
    if first is None:
        raise ValueError("dataset must hold at least one image; received an empty dataset.")
    _to_uint8(first["image"], "dataset's first element")
    if is_batched:
        records = records.unbatch()
    image = records.element_spec["image"]
    shape = _final_shape(image.shape[:2], image_size, min_size, "the dataset")

    def decode(record):
        pixels = record["image"]
        if pixels.dtype != tf.uint8:
            pixels = tf.cast(pixels, tf.float32)
            in_range = tf.reduce_all((pixels >= 0) & (pixels <= 255))
            tf.debugging.Assert(in_range, ["dataset: expected values in 0-255, received", pixels])
            pixels = tf.cast(tf.round(pixels), tf.uint8)
        pixels = pixels[..., None] if pixels.shape.rank == 2 else pixels
        return {**record, "image": _finish(pixels, shape, min_size)}

    examples = max(int(dataset.cardinality()), -1) if not is_batched else -1
    return _Opened(records, decode, _shuffle_buffer(examples, image.shape, image.dtype.size))


def _check_image_spec(spec):
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank not in (2, 3, 4):
        expected = False
    else:
        expected = spec.shape.rank == 2 or spec.shape[-1] in (1, 3, 4)
    if not expected:
        raise ValueError(
            "dataset must yield images (H, W), (H, W, C) or (B, H, W, C) with 1, 3 or 4 channels; "
            f"received elements {spec}."
        )
    if not (spec.dtype.is_integer or spec.dtype.is_floating):
        raise ValueError(
            f"dataset must yield integers or floats in 0-255; received dtype {spec.dtype.name}."
        )


def _check_image_batches(name, dataset):
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            f"{name} must be a batched tf.data.Dataset; received {type(dataset).__name__}. "
            "`sddns_tf.data.load(array, batch_size=...)` makes one of an array."
        )
    spec = dataset.element_spec
    if (
        not isinstance(spec, tf.TensorSpec)
        or spec.shape.rank != 4
        or spec.shape[-1] != 3
        or not (spec.dtype == tf.uint8 or spec.dtype.is_floating)
    ):
        raise ValueError(
            f"{name} must yield uint8 or float batches (B, H, W, 3); received elements {spec}. "
            "`sddns_tf.data.load(dataset, batch_size=...)` converts other image datasets."
        )


def _is_empty(dataset):
    cardinality = dataset.cardinality()
    if cardinality == tf.data.UNKNOWN_CARDINALITY:
        return next(iter(dataset.take(1)), None) is None
    return cardinality == 0


# --- Pixels -------------------------------------------------------------------------------------


def _final_shape(stored, image_size, min_size, name):
    """Returns `(height, width)` of the images to yield."""
    known = [side for side in stored if side is not None]
    if min_size and known and min(known) < min_size:
        raise ValueError(
            f"{name} must hold images of at least min_size={min_size} pixels a side; received "
            f"{_by(stored)}."
        )
    if image_size is not None:
        return (image_size, image_size)
    if len(known) < 2:
        raise ValueError(f"image_size is needed: {name} states no fixed size of its images.")
    return tuple(stored)


def _finish(images, shape, min_size):
    """Makes uint8 `(..., H, W, C)` RGB of the given height and width."""
    if min_size:
        sides = tf.shape(images)[-3:-1]
        tf.debugging.assert_greater_equal(sides, min_size, f"an image is under {min_size} pixels")
    if images.shape[-1] == 1:
        images = tf.repeat(images, 3, axis=-1)
    return tf.ensure_shape(_resize(images[..., :3], shape), (*images.shape[:-3], *shape, 3))


def _resize(images, size):
    """Resizes images in 0-255 to `(height, width)`, and keeps their dtype."""
    if not tf.is_tensor(size) and tuple(images.shape[-3:-1]) == tuple(size):
        return images
    resized = tf.image.resize(images, size, method="bicubic", antialias=True)
    resized = tf.clip_by_value(tf.cast(resized, tf.float32), 0.0, 255.0)  # bicubic overshoots
    return tf.cast(tf.round(resized) if images.dtype.is_integer else resized, images.dtype)


def _shuffle_buffer(examples, shape, bytes_per_value=1):
    """Returns how many images to hold, given how many there are (-1: unknown) and their shape."""
    image_bytes = np.prod(shape) * bytes_per_value if None not in shape else _UNKNOWN_IMAGE_BYTES
    affordable = max(1, int(_SHUFFLE_BYTES // image_bytes))
    return affordable if examples < 0 else min(examples, affordable)


def _image_of(example):
    return example["image"]


def _check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer; received {value!r}.")


def _name(source):
    return source if isinstance(source, str) else f"the {type(source).__name__}"


def _by(shape):
    return f"{shape[0]} x {shape[1]}"
