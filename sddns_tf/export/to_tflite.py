"""Export a detector as a `.tflite` file for edge devices."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import networks
from sddns_tf.calibration import ending_at, merged, snapped
from sddns_tf.export import delegates, extension, metadata
from sddns_tf.export.quantize import backbone_scope, import_quantizer, quantized_model
from sddns_tf.export.verify import (
    CHECKED_IMAGES,
    COSINE_TOLERANCE,
    check_answers,
    images_or_synthetic,
    resolution,
    run_apart,
    save,
    score_tolerance,
    temporary_folder_in,
)
from sddns_tf.types import Array
from sddns_tf.validation import check_int
from sddns_tf.version import __version__

# Calibration scores that fit into the file if a device recalibrates it with its own images.
_CALIBRATION_ROOM = 1000

# Devices score few images at a time, so the bank is compared in one piece, which delegates prefer.
_WHOLE_BANK = 2**30

_LABELS = {
    "ood_score": "float32 (B,): higher is more out-of-distribution",
    "p_value": "float32 (B,): share of normal images that score at least as high",
    "is_ood": "bool (B,): p_value <= false_positive_rate",
}
_MAP_LABEL = "float32 (B, h, w): score of each place; one is above the threshold iff is_ood"

_RUN_TFLITE = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["sddns_tf"] = None
import numpy as np
from ai_edge_litert.interpreter import Interpreter
runner = Interpreter("export").get_signature_runner("serving_default")
images, batch = np.load("images.npy"), {batch_size}
answers = [runner(images=images[i : i + batch]) for i in range(0, len(images), batch)]
np.savez("answers.npz", **{{k: np.concatenate([a[k] for a in answers]) for k in answers[0]}})
"""


def tflite(
    detector: Any,
    path: str | os.PathLike,
    quantization: str | None = None,
    representative_images: Any = None,
    calibration_images: Any = None,
    bank_size: int = 1000,
    batch_size: int | None = None,
    extension_room: int = 0,
    verbose: int | str = "auto",
) -> pathlib.Path:
    """Write a detector as one `.tflite` file that needs only built-in operations.

    Its signature `serving_default` takes `images`, uint8 `(B, h, w, 3)`, already resized to
    `detector.extractor.resolution`. It returns `ood_score`, `p_value` and `is_ood`, each `(B,)`,
    and for a local detector `anomaly_map`, `(B, h, w)`. The file runs in `ai_edge_litert` without
    TensorFlow. It contains a description of itself (see `metadata`), with a list of operations that
    delegates other than the CPU's do not support (see `delegates`). With `verbose=1` this list is
    printed.

    Quantization applies to the dense layers and convolutions of the backbone. Everything else stays
    float32, in particular bank, score and calibration. On a CPU try `"dynamic"` first: it is the
    smallest, as fast as `"int8"` and much closer to the detector. A backbone in mixed precision is
    exported in float32.

    P-values must be calibrated with the scores that the file itself gives. If these differ from the
    detector's, because the bank is compressed or the backbone quantized, the file is recalibrated:
    it scores the calibration images. Without `calibration_images` such an export is an error. Only
    float32 or float16 with the whole bank keeps the detector's calibration.

    Args:
        detector: A `Detector`.
        path: Path of the file to write. An existing file is replaced atomically.
        quantization: None for float32. `"float16"` stores weights as float16 and computes in
            float32. `"dynamic"` has int8 weights and quantizes activations image by image.
            `"int8"` has int8 weights and activations, with ranges set by representative images.
        representative_images: uint8 `(N, h, w, 3)` at the detector's resolution, about a hundred.
            Needed for `"int8"`; images of the bank will do. Activations outside the observed range
            saturate, so the images should vary as much as those to be scored. The first 16 are
            used for the comparison; without them calibration images, or synthetic images, are.
        calibration_images: uint8 `(N, h, w, 3)` at the detector's resolution: those that the
            detector was calibrated with, or others that are neither trained on nor in the bank.
        bank_size: Largest number of rows in the bank. A larger bank is compressed to that many
            centers by weighted k-means (see `bank.compress`), and a bank of places by
            `bank.coreset`. None keeps the whole bank.
        batch_size: None for any batch size, or a fixed one. A fixed one is somewhat faster, because
            the delegate can then take the whole backbone. With 1 all shapes are fixed, which
            delegates other than the CPU's need.
        extension_room: Int, for a local detector with `k=1`: rows that are left free in the file,
            so that `examples/edge_inference.py --extend` can make false alarms count as normal on
            the device, as `Detector.extend` does. Each takes 4 bytes per channel of the maps. The
            signature then also returns `features`, `(B, h, w, C)`, and `place_scores`,
            `(B, h, w)`, from which such rows are made.
        verbose: 0 is silent; 1 shows a progress bar over calibration images and prints the
            operations that delegates do not support; 2 shows the bar as one line; `"auto"` shows
            the bar if there is more than one step.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: If `ai-edge-litert`, or `ai-edge-quantizer` for a quantization, is missing.
        RuntimeError: If what was written does not run, uses an operation that is not built in, or
            does not agree with the detector (with its bank compressed the same way): as for
            `saved_model`, with 1e-3 (`"float16"`), 1e-2 (`"dynamic"`) or 2e-2 (`"int8"`) instead
            of 4e-6. Nothing is left behind.
        ValueError: If the quantization is unknown, if needed images are missing, too few or of a
            wrong dtype or shape, if a size is not a positive int, or if there cannot be room for
            an extension.

    Example:
    >>> sddns_tf.export.tflite(
    ...     detector, "parts.tflite", quantization="dynamic", calibration_images=held_out_images
    ... )
    PosixPath('parts.tflite')
    """
    _check_arguments(quantization, representative_images, bank_size, batch_size)
    extension.check_room(detector, extension_room)
    _import_litert()
    if quantization is not None:
        import_quantizer()
    calibration = None
    if calibration_images is not None:
        calibration = _checked(detector, calibration_images, "calibration_images")
    given = representative_images if representative_images is not None else calibration
    images = _checked(detector, images_or_synthetic(detector, given), "representative_images")
    compressed = bank_size is not None and bank_size < detector.bank.shape[0]
    if calibration is None and (compressed or quantization in ("dynamic", "int8")):
        raise ValueError(
            f"`calibration_images` are needed: with quantization={quantization!r} and "
            f"bank_size={bank_size} for a bank of {detector.bank.shape[0]} rows, the file's scores "
            "differ from the detector's, so it has to be recalibrated. Pass the images that the "
            "detector was calibrated with. Received: calibration_images=None"
        )
    if calibration is not None:
        detector.calibrated_on(calibration, verbose=verbose)  # warns of images that are in the bank
    path = pathlib.Path(path).expanduser()
    with temporary_folder_in(path.parent) as folder:
        reference = _in_float32(detector)
        if compressed:
            reference = reference.compressed(bank_size)
        scores = detector.calibration_scores.numpy()
        room = max(_CALIBRATION_ROOM, len(scores), 0 if calibration is None else len(calibration))
        file = _converted(reference, folder, quantization, images, batch_size, room, extension_room)
        if calibration is not None:
            scores = _scores(file, calibration, batch_size, verbose)
        metadata.calibrate(file, merged(scores, detector.rounding), detector.false_positive_rate)
        _check(
            file,
            folder,
            reference.with_calibration_scores(scores),
            images,
            quantization,
            batch_size,
        )
        os.replace(folder / "export", path)
    if verbose == 1:
        print(delegates.report(metadata.operators(file), quantization, batch_size))
    return path


def _check_arguments(
    quantization: str | None,
    representative_images: Array | None,
    bank_size: int | None,
    batch_size: int | None,
) -> None:
    if quantization not in COSINE_TOLERANCE:
        raise ValueError(
            f"`quantization` must be one of {list(COSINE_TOLERANCE)}. Received: {quantization!r}"
        )
    if quantization == "int8" and representative_images is None:
        raise ValueError(
            '`quantization="int8"` needs `representative_images`, which set the ranges of '
            'activations; without them use "dynamic". Received: representative_images=None'
        )
    for name, value in (("bank_size", bank_size), ("batch_size", batch_size)):
        if value is not None:
            check_int(name, value)


def _checked(detector: Any, images: Array, name: str) -> np.ndarray:
    """Return images as uint8, if they are valid and at the detector's resolution."""
    images, size = images_or_synthetic(detector, images, name), resolution(detector)
    if images.shape[1:3] != size:
        raise ValueError(
            f"`{name}` must be at the detector's resolution, (N, {size[0]}, {size[1]}, 3). "
            f"Received: shape={images.shape}"
        )
    return images


def _import_litert() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "TFLite files need the package `ai-edge-litert`: `pip install sddns_tf[tflite]`."
        ) from error
    return Interpreter


def _converted(
    detector: Any,
    folder: pathlib.Path,
    quantization: str | None,
    images: np.ndarray,
    batch_size: int | None,
    room: int,
    extension_room: int,
) -> bytearray:
    """Return the bytes of the file, with a description and placeholders for the calibration."""
    size = resolution(detector)
    extending = extension.placeholders(detector, extension_room)
    placeholders = {**metadata.calibration_placeholders(room), **extending}
    answer = _answer(detector, placeholders, (batch_size, *size))
    save(folder / "saved_model", detector, {"serving_default": answer})
    # No Flex or custom operations: the converter rejects them unless they are enabled.
    file = tf.lite.TFLiteConverter.from_saved_model(
        str(folder / "saved_model"), signature_keys=["serving_default"]
    ).convert()
    if quantization is not None:
        # Representative images are run one at a time; a fixed batch is filled with copies.
        file = quantized_model(file, quantization, backbone_scope(detector), images, batch_size)
    foreign = [name for name in metadata.operators(file) if name in ("CUSTOM", "DELEGATE")]
    if foreign:
        raise RuntimeError(f"The file must need built-in operations only. Received: {foreign}")
    outputs = {**_LABELS, **({"anomaly_map": _MAP_LABEL} if detector.is_local else {})}
    if extending:
        outputs.update(extension.LABELS)
    description = {
        "outputs": outputs,
        "image_size": list(size),
        "resize": detector.extractor.resize,
        "batch_size": batch_size,
        "quantization": quantization,
        "bank_rows": detector.bank.shape[0],
        "sddns_tf": __version__,
        "calibration_room": room,
        "lowest_score": detector.lowest_score,
        "map_size": detector.extractor.map_size,
        "refused_by_delegates": delegates.refused(metadata.operators(file)),
    }
    if extending:
        description["extension_room"] = extension_room
    file = metadata.described(file, description, placeholders)
    if extending:
        extension.clear(file)
    return file


def _answer(detector: Any, placeholders: dict[str, Any], shape: tuple[int | None, ...]) -> Callable:
    """Return `Detector.call` with a calibration and an extension that can be rewritten."""
    images = tf.TensorSpec([*shape, 3], tf.uint8, name="images")

    @tf.function(input_signature=[images], autograph=False)
    def answer(images: Array) -> dict[str, tf.Tensor]:
        features, extras = detector.extractor(images), {}
        if "extension" in placeholders:
            near = extension.scores(detector, features, placeholders["extension"])
            maps = tf.minimum(detector.place_scores(features, _WHOLE_BANK), near)
            found = detector.image_scores(maps)
            each = detector.image_scores(maps, smooth=False)["anomaly_map"]
            extras = {"features": features, "place_scores": each}
        else:
            found = detector.scores(features, _WHOLE_BANK)
        score = snapped(found["ood_score"], placeholders["scores"], detector.rounding)
        # A score of NaN gets the lowest p-value, because every comparison with it is false.
        as_high = placeholders["scores"][np.newaxis, :] >= score[:, tf.newaxis]
        count = tf.reduce_sum(tf.cast(as_high, tf.int32), axis=1)
        # A table, because the converter turns division by a constant into a less exact product.
        p_value = tf.gather(placeholders["p_values"], count)
        answers = {
            "ood_score": score,
            "p_value": p_value,
            "is_ood": p_value <= placeholders["rate"],
        }
        if detector.is_local:
            answers["anomaly_map"] = ending_at(found["anomaly_map"], score)
        return {**answers, **extras}

    return answer


def _scores(
    file: bytearray, images: np.ndarray, batch_size: int | None, verbose: int | str
) -> np.ndarray:
    """Return the file's scores for images, float32 `(N,)`."""
    interpreter = _import_litert()(model_content=bytes(file), num_threads=os.cpu_count())
    runner, step = interpreter.get_signature_runner("serving_default"), batch_size or 1
    starts = range(0, len(images), step)
    progress = keras.utils.Progbar(
        len(starts), verbose=int(len(starts) > 1) if verbose == "auto" else verbose
    )
    scores = []
    for number, start in enumerate(starts):
        batch = images[start : start + step]
        filled = np.resize(batch, (step, *batch.shape[1:]))
        scores.append(runner(images=filled)["ood_score"][: len(batch)])
        progress.update(number + 1)
    return np.concatenate(scores)


def _check(
    file: bytearray,
    folder: pathlib.Path,
    reference: Any,
    images: np.ndarray,
    quantization: str | None,
    batch_size: int | None,
) -> None:
    """Compare the file with the detector, and write it to the folder with the result."""
    count = CHECKED_IMAGES if batch_size is None else -(-CHECKED_IMAGES // batch_size) * batch_size
    images = np.resize(images, (count, *images.shape[1:])) if batch_size else images[:count]
    (folder / "export").write_bytes(file)
    answers = run_apart(_RUN_TFLITE.format(batch_size=batch_size or 8), folder, images)
    tolerance = COSINE_TOLERANCE[quantization]
    difference = check_answers(reference, images, answers, "", tolerance)
    checked = {
        "images": len(images),
        "largest_score_difference": float(difference),
        "allowed": score_tolerance(reference, tolerance),
    }
    metadata.describe(file, {"self_check": checked})
    (folder / "export").write_bytes(file)


def _in_float32(detector: Any) -> Any:
    """Return the detector, or a float32 copy of one in mixed precision, which TFLite lacks."""
    config = detector.get_config()
    float_config = _with_float32_policies(config)
    if float_config == config:
        return detector
    copy = type(detector).from_config(float_config)
    copy.set_weights(detector.get_weights())
    networks.use_new_weights(copy)
    return copy


def _with_float32_policies(config: Any) -> Any:
    if isinstance(config, (list, tuple)):
        return type(config)(_with_float32_policies(value) for value in config)
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {**config["config"], "name": "float32"}}
    return {key: _with_float32_policies(value) for key, value in config.items()}
