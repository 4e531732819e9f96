"""Images of prepared TFDS data sets. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from sddns_tf import image_ops
from sddns_tf.data.pixels import Opened, Shaping, shuffle_buffer


def open_tfds(
    name: str,
    shaping: Shaping,
    exclude_labels: Sequence[str],
    split: str,
    data_dir: str | None,
    shuffle_files_seed: int | None = None,
) -> Opened:
    """Open a prepared TFDS data set with a uint8 `image` feature."""
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir)
    try:
        examples = builder.info.splits[split].num_examples if isinstance(split, str) else 0
    except (KeyError, ValueError):
        examples = 0
    if examples < 1:
        raise ValueError(
            f"tfds:{name} has the splits {sorted(builder.info.splits)}, of which `split` must name "
            f"images, as in 'test' or 'test[:100]'. Received: split={split!r}"
        )
    features = dict(builder.info.features.items())
    image = features.get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(
            f"tfds:{name} must have a uint8 image feature named 'image'. Received: the features "
            f"{sorted(features)}."
        )
    has_label = "label" in features and features["label"].shape == ()
    excluded = _excluded_ids(name, features, exclude_labels)
    shape = shaping.final_shape(image.shape[:2], f"tfds:{name}")

    # The stored bytes are shuffled and filtered; only images that are used are decoded.
    wanted = {"image": True, "label": True} if has_label else {"image": True}
    config = tfds.ReadConfig(
        try_autocache=False, skip_prefetch=True, shuffle_seed=shuffle_files_seed
    )
    config.options.deterministic = True
    decoders = tfds.decode.PartialDecoding(wanted, {"image": tfds.decode.SkipDecoding()})
    shuffle_files = shuffle_files_seed is not None
    with _without_warnings():
        records = builder.as_dataset(
            split, decoders=decoders, read_config=config, shuffle_files=shuffle_files
        )
    if excluded:
        records = records.filter(lambda record: tf.reduce_all(record["label"] != excluded))
    if next(iter(records.take(1)), None) is None:
        raise ValueError(
            f"tfds:{name} must have at least one image left. Received: split={split!r} of "
            f"{examples} images, exclude_labels={list(exclude_labels)}"
        )

    def decode(record):
        pixels = image_ops.decoded(record["image"])
        return {**record, "image": shaping.finish(pixels, shape)}

    return Opened(records, decode, shuffle_buffer(examples, image.shape))


@contextlib.contextmanager
def _without_warnings():
    """Silence TFDS, whose `PartialDecoding` warns of an attribute that it uses itself."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tfds_builder(name, data_dir):
    import tensorflow_datasets as tfds

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    data_dir = os.path.expanduser(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        # For an unknown name, TFDS lists a thousand known ones after the first line.
        reason = str(error).split("\n")[0]
    else:
        if tf.io.gfile.isdir(builder.data_dir):
            return builder
        reason = (
            f"not prepared there; if TFDS knows it, `tfds build {name} --data_dir={data_dir}` "
            "prepares it"
        )
    prepared = []
    if tf.io.gfile.isdir(data_dir):
        prepared = sorted(entry.rstrip("/") for entry in tf.io.gfile.listdir(data_dir))
    raise ValueError(
        f"tfds:NAME must be one of the data sets prepared in {data_dir}, {prepared}; data_dir or "
        "the environment variable TFDS_DATA_DIR names another folder. "
        f"Received: tfds:{name} ({reason})"
    )


def _excluded_ids(name, features, exclude_labels):
    if not exclude_labels:
        return []
    names = getattr(features["label"], "names", None) if "label" in features else None
    if names is None:
        raise ValueError(f"`exclude_labels` needs a set with named labels. Received: tfds:{name}")
    unknown = sorted(set(exclude_labels) - set(names))
    if unknown:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(
            f"`exclude_labels` must be labels of tfds:{name} ({shown}). Received: {unknown}"
        )
    return [names.index(label) for label in sorted(set(exclude_labels))]
