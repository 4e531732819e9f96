"""Load a detector from any kind of file as a function from images to answers.

A `.tflite` file is loaded without TensorFlow and Keras, as on a device.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sddns_tf.cli import starting
from sddns_tf.cli.errors import UsageError, name_of, user_input


class MapScale(NamedTuple):
    """The scale on which an anomaly map is drawn.

    Attributes:
        threshold: Score above which a place is flagged.
        lowest: Score of what is in the bank.
        crop_to: Height and width with the aspect ratio that the detector crops to, or None.
    """

    threshold: float
    lowest: float
    crop_to: tuple[int, int] | None = None


class Scorer(NamedTuple):
    """A detector loaded from a file.

    Attributes:
        answer: Function from uint8 images `(N, H, W, 3)` to a dictionary of arrays `(N,)`.
        size: Height and width of the images that it takes, or None for any size.
        resize: How to resize an image to that size: `"squash"` or `"crop"`.
        map_scale: `MapScale` of a local detector, otherwise None.
    """

    answer: Callable
    size: tuple[int, int] | None = None
    resize: str = "squash"
    map_scale: MapScale | None = None


def open_model(path: str | pathlib.Path, threads: int | None = None) -> Scorer:
    """Load a detector from a file or folder.

    Args:
        path: A `.tflite` file, a `.keras` file, the folder of a SavedModel, or the folder that
            holds its numbered versions, of which the latest is taken.
        threads: CPU cores to use for a `.tflite` file, or None for all.

    Returns:
        `Scorer`.

    Raises:
        UsageError: If there is no such file, or it cannot be loaded.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".tflite" and path.is_file():
        return _tflite(path, threads)
    if path.suffix == ".keras" and path.is_file():
        return _keras(path)
    if (folder := saved_model_folder(path)) is not None:
        return _saved_model(folder)
    raise UsageError(
        "--model must be an existing .tflite file, .keras file or folder of a SavedModel. "
        f"Received: {path}"
    )


def saved_model_folder(path: pathlib.Path) -> pathlib.Path | None:
    """Return the folder of a SavedModel, given that folder or the one that holds its versions.

    Returns None if the path is neither.
    """
    if (path / "saved_model.pb").is_file():
        return path
    versions = [file.parent for file in path.glob("*/saved_model.pb")]
    versions = [folder for folder in versions if folder.name.isdecimal()]
    return max(versions, key=lambda folder: int(folder.name), default=None)


def load_keras(option: str, path: str | pathlib.Path, kind: type | None = None) -> Any:
    """Load a Keras model.

    Args:
        option: Name of the option, for error messages.
        path: Path of a `.keras` file.
        kind: Class that the model must have, or None for any.

    Returns:
        Keras model.

    Raises:
        UsageError: If there is no such file, or it holds something else.
    """
    import keras

    import sddns_tf  # noqa: F401  (registers the classes)

    path = pathlib.Path(path).expanduser()
    if not path.is_file() or path.suffix != ".keras":
        raise UsageError(f"{name_of(option)} must be an existing .keras file. Received: {path}")
    try:
        model = keras.saving.load_model(path)
    except Exception as error:  # Errors of zipfile, json and h5py too.
        raise UsageError(
            f"{name_of(option)} must be a model that Keras can load. Received: {path} ({error})"
        ) from error
    if kind is not None and not isinstance(model, kind):
        raise UsageError(
            f"{name_of(option)} must hold a {kind.__name__}. Received: {path}, which holds a "
            f"{type(model).__name__}"
        )
    return model


def _tflite(path: pathlib.Path, threads: int | None) -> Scorer:
    with user_input("model"):
        from ai_edge_litert.interpreter import Interpreter

        from sddns_tf.export import metadata

    try:
        interpreter = Interpreter(str(path), num_threads=threads or os.cpu_count())
        runner = interpreter.get_signature_runner("serving_default")
    except (ValueError, RuntimeError, KeyError) as error:
        raise UsageError(
            f"--model must be a .tflite file that sddns export wrote. Received: {path} ({error})"
        ) from error
    with user_input("model"):
        description = metadata.description(path.read_bytes())
    batch, height, width, _ = interpreter.get_input_details()[0]["shape_signature"].tolist()

    def answer(images: np.ndarray) -> dict[str, np.ndarray]:
        if batch < 0:
            return runner(images=images)
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            full = np.resize(part, (batch, *part.shape[1:]))
            parts.append({k: v[: len(part)] for k, v in runner(images=full).items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    scale = None
    if description.get("map_size"):
        scale = MapScale(description["threshold"], description["lowest_score"])
    return Scorer(answer, (height, width), description.get("resize", "squash"), scale)


def _saved_model(folder: pathlib.Path) -> Scorer:
    starting.import_tensorflow()
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    damaged = (OSError, LookupError, ValueError, DecodeError, tf.errors.OpError)
    try:
        signature = tf.saved_model.load(str(folder)).signatures["serving_default"]
    except damaged as error:
        raise UsageError(
            f"--model must be a SavedModel that sddns export wrote. Received: {folder} ({error})"
        ) from error
    return Scorer(
        lambda images: {k: v.numpy() for k, v in signature(images=tf.constant(images)).items()},
        map_scale=_described_scale(folder),
    )


def described(option: str, folder: pathlib.Path) -> dict[str, Any]:
    """Return the description in a SavedModel that `sddns export` wrote.

    Args:
        option: Name of the option, for error messages.
        folder: Folder of the SavedModel.

    Returns:
        Dictionary from `metadata.json`.

    Raises:
        UsageError: If it is missing or damaged.
    """
    path = folder / "assets.extra" / "metadata.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all("sha256" in file for file in found["files"].values()):
            return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UsageError(
        f"{name_of(option)} must be a SavedModel that sddns export wrote. Received: {folder}, "
        f"without a whole {path.relative_to(folder)}"
    )


def _described_scale(folder: pathlib.Path) -> MapScale | None:
    """Return the scale that the description of a SavedModel states, if it has maps."""
    try:
        about = described("model", folder)
    except UsageError:  # Without maps nothing of it is needed.
        return None
    if not about.get("map_size"):
        return None
    crops = about["configuration"]["extractor"]["config"]["resize"] == "crop"
    crop_to = tuple(about["resolution"]) if crops else None
    return MapScale(about["threshold"], about["lowest_score"], crop_to)


def _keras(path: pathlib.Path) -> Scorer:
    starting.import_tensorflow()
    import tensorflow as tf

    import sddns_tf

    detector = load_keras("model", path, sddns_tf.Detector)
    # Traced once for all sizes: a trace per size would make memory grow.
    spec = tf.TensorSpec([None, None, None, 3], tf.uint8)
    call = tf.function(lambda images: detector(images), input_signature=[spec], autograph=False)
    scale, extractor = None, detector.extractor
    if detector.is_local:
        size = extractor.resolution or extractor.image_size
        crop_to = size if extractor.resize == "crop" else None
        scale = MapScale(detector.threshold, detector.lowest_score, crop_to)
    return Scorer(
        lambda images: {name: value.numpy() for name, value in call(images).items()},
        map_scale=scale,
    )
