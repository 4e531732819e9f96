"""The images of a training run: sources held in memory or streamed, and batches from any step."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

from sddns_tf.cli import sources
from sddns_tf.cli.configuration import DataOptions
from sddns_tf.cli.errors import UsageError, user_input

# Unless the configuration says otherwise.
_CALIBRATION_SHARE = 0.1
_BATCH_SIZE = 64


class Images(NamedTuple):
    """The images that a training run uses.

    Attributes:
        training: uint8 `(N, H, W, 3)`, or None if they are read again in every epoch.
        calibration: uint8 `(M, H, W, 3)`, images that are not trained on.
        auxiliary: uint8 `(A, H, W, 3)`, or None if there are none or they are read again in every
            epoch.
        resolution: Height and width of all these images.
    """

    training: np.ndarray | None
    calibration: np.ndarray
    auxiliary: np.ndarray | None
    resolution: tuple[int, int]


def read(config: dict[str, Any], data_options: DataOptions, data_dir: str | None) -> Images:
    """Read the images that are held in memory.

    Args:
        config: Resolved configuration.
        data_options: The `DataOptions` of the configuration.
        data_dir: Folder of prepared TFDS data sets, or None.

    Returns:
        `Images`.

    Raises:
        UsageError: If a source cannot be read or leaves too few images to calibrate with.
    """
    resolution: Any = data_options.resolution
    location = sources.parse("data", data_options.source, "train").location
    if resolution is None and location.startswith("folder:"):
        resolution = config["views"]["image_size"]
    reading = _reading(data_options, data_dir, resolution)
    training: Any = None
    if data_options.in_memory:
        source = sources.parse("data", data_options.source, "train")
        training = sources.read("data", source, limit=data_options.limit, **reading)
        reading["image_size"] = training.shape[1:3]
    if data_options.calibration:
        source = sources.parse("calibration", data_options.calibration, "test")
        calibration = sources.read("calibration", source, **reading)
    else:
        training, calibration = _held_out(config, data_options, training)
    resolution = tuple(calibration.shape[1:3])
    auxiliary: Any = None
    if compares_auxiliary(config) or (needs_auxiliary(config) and data_options.in_memory):
        reading["image_size"] = resolution
        source = sources.parse("auxiliary", data_options.auxiliary, "train")
        auxiliary = sources.read("auxiliary", source, **reading, **_excluded(data_options))
    return Images(training, calibration, auxiliary, resolution)


def fingerprint(images: np.ndarray | None) -> str | None:
    """Return a short text that differs for other images, or None for none."""
    if images is None:
        return None
    found = hashlib.sha256(repr((images.shape, images.dtype.str)).encode())
    found.update(np.ascontiguousarray(images).data)
    return found.hexdigest()[:16]


def number_of(images: np.ndarray | None) -> str:
    """Return how many images there are, as text."""
    return "streamed" if images is None else f"{len(images):,}"


def batches(
    config: dict[str, Any],
    data_options: DataOptions,
    data_dir: str | None,
    images: Images,
    first_batch: int | None = None,
) -> Any:
    """Return shuffled batches of images, with auxiliary images if the negatives need them.

    Args:
        config: Resolved configuration.
        data_options: The `DataOptions` of the configuration.
        data_dir: Folder of prepared TFDS data sets, or None.
        images: `Images`.
        first_batch: None for one epoch. Otherwise the batches repeat forever, starting with this
            one.

    Returns:
        `tf.data.Dataset` that `SelfDistillation.fit` takes.
    """
    from sddns_tf import data

    options = {"batch_size": config["batch_size"], "shuffle": True, "first_batch": first_batch}
    reading = _reading(data_options, data_dir, images.resolution)

    def load(option: str, text: str | None, array: Any, **more: Any) -> Any:
        if array is None:
            source = sources.parse(option, text, "train")
            return sources.stream(option, source, **reading, **options, **more)
        more.pop("exclude_labels", None)  # already applied when the array was read
        with user_input(option):
            return data.load(array, **options, **more)

    normal = load(
        "data", data_options.source, images.training, seed=config["seed"], drop_remainder=True
    )
    if not needs_auxiliary(config):
        return normal
    auxiliary = load(
        "auxiliary",
        data_options.auxiliary,
        images.auxiliary,
        seed=config["seed"] + 1,
        **_excluded(data_options),
    )
    return data.with_auxiliary(normal, auxiliary)


def batch_size(config: dict[str, Any], training: np.ndarray | None) -> int:
    """Return the number of images per step: by default 64, or all where there are fewer.

    Args:
        config: Resolved configuration.
        training: The images to train on, or None if they are streamed.

    Raises:
        UsageError: If a step would take more images than there are.
    """
    given = config["batch_size"]
    if training is None:
        return given or _BATCH_SIZE
    if given is not None and given > len(training):
        raise UsageError(
            "--batch_size must be at most the number of images to train on, "
            f"{len(training)}. Received: {given}"
        )
    return given or min(_BATCH_SIZE, len(training))


def bank(
    config: dict[str, Any], data_options: DataOptions, data_dir: str | None, images: Images
) -> Any:
    """Return the training images for `Detector.from_images`, in memory or in batches."""
    if images.training is not None:
        return images.training
    source = sources.parse("data", data_options.source, "train")
    reading = _reading(data_options, data_dir, images.resolution)
    size = batch_size(config, images.training)
    return sources.stream("data", source, batch_size=size, **reading)


def needs_auxiliary(config: dict[str, Any]) -> bool:
    """Return whether negatives are made from auxiliary images."""
    negatives = config["negatives"]
    return negatives is not None and negatives["source"] != "in_distribution"


def compares_auxiliary(config: dict[str, Any]) -> bool:
    """Return whether the detector's score has a second voice."""
    return bool(config["detector"]["auxiliary_weight"])


def _reading(data_options: DataOptions, data_dir: str | None, resolution: Any) -> dict[str, Any]:
    size = tuple(resolution) if isinstance(resolution, list) else resolution
    return {
        "data_dir": data_dir,
        "image_size": size,
        "resize": data_options.resize,
        "on_error": data_options.on_error,
    }


def _excluded(data_options: DataOptions) -> dict[str, list[str]]:
    if not data_options.auxiliary_exclude:
        return {}
    return {"exclude_labels": sources.read_class_names(data_options.auxiliary_exclude)}


def _held_out(
    config: dict[str, Any], data_options: DataOptions, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Split images into those to train on and those to calibrate with."""
    order = np.random.default_rng(config["seed"]).permutation(len(images))
    share = data_options.calibration_share
    count = math.ceil((_CALIBRATION_SHARE if share is None else share) * len(images))
    rate = config["detector"]["false_positive_rate"]
    needed = math.ceil(1 / rate - 1e-6) - 1
    if share is None:
        count = max(count, needed)
        if 2 * count > len(images):
            raise UsageError(
                f"--data must hold at least {2 * needed} images: {needed} to calibrate with, for "
                f"--false_positive_rate={rate}, and as many to train on. Otherwise name others to "
                f"calibrate with as --calibration. Received: {len(images)} images"
            )
    elif count < needed or count >= len(images):
        raise UsageError(
            f"--calibration_share must leave at least {needed} images to calibrate with, for "
            f"--false_positive_rate={rate}, and some to train on. "
            f"Received: {share}, which is {count} of {len(images)} images"
        )
    return images[np.sort(order[count:])], images[np.sort(order[:count])]
