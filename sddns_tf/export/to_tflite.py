"""A detector as one `.tflite` file for edge devices."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sddns_tf.calibration import lowered, merged, snapped
from sddns_tf.export import delegates, metadata
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
from sddns_tf.validation import check_int
from sddns_tf.version import __version__

# Room for the calibration scores of a device's own images.
_CALIBRATION_ROOM = 1000

# A file scores few images at a time: the bank in one piece, as a delegate wants it.
_WHOLE_BANK = 2**30

_LABELS = {
    "ood_score": "float32 (B,): higher is more out-of-distribution",
    "p_value": "float32 (B,): share of normal images that score at least as high",
    "is_ood": "bool (B,): p_value <= false_positive_rate",
}
_MAP_LABEL = "float32 (B, h, w): score of each place; some place is above threshold iff is_ood"

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
    verbose: int | str = "auto",
) -> pathlib.Path:
    """Write a detector as one `.tflite` file of built-in operations.

    Its signature `serving_default` takes `images`, uint8 `(B, h, w, 3)`, already at the
    resolution of the in-distribution (`detector.extractor.resolution`), and gives `ood_score`,
    `p_value` and `is_ood`, each `(B,)`; of a local detector also `anomaly_map`, `(B, h, w)`. It
    runs in `ai_edge_litert` without TensorFlow, and its metadata describe it: see `metadata`. They
    tell as well which of its operations delegates other than the CPU's refuse: see `delegates`;
    with `verbose` it is printed.

    Quantization is that of the backbone's dense layers and convolutions; everything else,
    bank, score and calibration above all, stays float32. `"dynamic"` is the one to try first on
    a CPU: the smallest, as fast as `"int8"` and much closer to the detector. A backbone in mixed
    precision is exported in float32.

    The p-values are right for the scores that the file itself gives. So where these are others
    than the detector's, the bank being compressed or the backbone quantized, the file is
    calibrated anew: it scores the calibration images. Without `calibration_images` such an export
    is refused; only float32 or float16 with the whole bank keeps the detector's own scores.

    Args:
        detector: A `Detector`.
        path: Path of the file to write. A file of that name is replaced, at once and whole.
        quantization: None for float32; `"float16"` stores weights as float16 and computes in
            float32; `"dynamic"` has int8 weights and quantizes activations image by image;
            `"int8"` has int8 weights and activations, in ranges fixed by representative images.
        representative_images: uint8 `(N, h, w, 3)`, about a hundred, at the in-distribution's
            resolution, needed for `"int8"`; images of the bank will do. Activations beyond their
            range saturate, so let them vary as much as what is to be scored. The first 16 serve
            for the comparison, else calibration images do, else synthetic ones.
        calibration_images: uint8 `(N, h, w, 3)` at that resolution: those that the detector was
            calibrated with, or others that are neither trained on nor in the bank.
        bank_size: Largest number of rows of the bank, which is compressed to as many centers by
            weighted k-means: see `bank.compress`; of places by `bank.coreset`. None keeps the
            whole bank.
        batch_size: None for any number of images at a time, or the one number that the file
            takes: somewhat faster, as the delegate then takes the backbone as a whole. With 1 all
            shapes are fixed, as delegates other than the CPU's need it.
        verbose: Of the progress bar over calibration images, and of what delegates refuse: 0 is
            silent, 1 shows them, 2 the bar as one line; `"auto"` shows the bar where there is more
            than one step.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: If `ai-edge-litert`, or `ai-edge-quantizer` for a quantization, is missing.
        RuntimeError: If what was written does not run, uses an operation that is not built in, or
            does not agree with the detector (its bank compressed alike): as for `saved_model`,
            with 1e-3 (`"float16"`), 1e-2 (`"dynamic"`) or 2e-2 (`"int8"`) in place of 4e-6.
            Nothing is left behind.
        ValueError: If the quantization is unknown, images that are needed are missing, too few or
            of a wrong dtype or shape, or a size is not a positive int.

    Example:
    >>> sddns_tf.export.tflite(
    ...     detector, "parts.tflite", quantization="dynamic", calibration_images=held_out_images
    ... )
    PosixPath('parts.tflite')
    """
    _check_arguments(quantization, representative_images, bank_size, batch_size)
    _import_litert()
    if quantization is not None:
        import_quantizer()
    calibration = _checked(detector, calibration_images, "calibration_images")
    given = representative_images if representative_images is not None else calibration
    images = _checked(detector, images_or_synthetic(detector, given), "representative_images")
    compressed = bank_size is not None and bank_size < detector.bank.shape[0]
    if calibration is None and (compressed or quantization in ("dynamic", "int8")):
        raise ValueError(
            f"`calibration_images` are needed: with quantization={quantization!r} and a bank of "
            f"{detector.bank.shape[0]} rows at bank_size={bank_size} the file's scores are not the "
            "detector's, so that its p-values would not hold. Pass the images that the detector "
            "was calibrated with. Received: calibration_images=None."
        )
    path = pathlib.Path(path).expanduser()
    with temporary_folder_in(path.parent) as folder:
        reference = _in_float32(detector)
        if compressed:
            reference = reference.compressed(bank_size)
        scores = detector.calibration_scores.numpy()
        room = max(_CALIBRATION_ROOM, len(scores), 0 if calibration is None else len(calibration))
        file = _converted(reference, folder, quantization, images, batch_size, room)
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
    if verbose:
        print(delegates.report(metadata.operators(file), quantization, batch_size))
    return path


def _check_arguments(quantization, representative_images, bank_size, batch_size):
    if quantization not in COSINE_TOLERANCE:
        raise ValueError(
            f"`quantization` must be one of {list(COSINE_TOLERANCE)}. Received: {quantization!r}."
        )
    if quantization == "int8" and representative_images is None:
        raise ValueError(
            '`quantization="int8"` needs `representative_images`, which fix the ranges of '
            'activations. Without them use "dynamic". Received: representative_images=None.'
        )
    for name, value in (("bank_size", bank_size), ("batch_size", batch_size)):
        if value is not None:
            check_int(name, value)


def _checked(detector, images, name):
    """Return images that a file takes as they are, or None."""
    if images is None:
        return None
    images, size = images_or_synthetic(detector, images, name), resolution(detector)
    if images.shape[1:3] != size:
        raise ValueError(
            f"`{name}` must be at the in-distribution's resolution, (N, {size[0]}, "
            f"{size[1]}, 3). Received: shape={images.shape}."
        )
    return images


def _import_litert():
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise ImportError(
            "TFLite files need the package `ai-edge-litert`: `pip install sddns_tf[tflite]`."
        ) from error
    return Interpreter


def _converted(detector, folder, quantization, images, batch_size, room):
    """Return bytes of the file, with a description and placeholders for a calibration."""
    size = resolution(detector)
    placeholders = metadata.calibration_placeholders(room)
    answer = _answer(detector, placeholders, (batch_size, *size))
    save(folder / "saved_model", detector, {"serving_default": answer})
    # No Flex or custom operations: the converter refuses them unless they are asked for.
    file = tf.lite.TFLiteConverter.from_saved_model(
        str(folder / "saved_model"), signature_keys=["serving_default"]
    ).convert()
    if quantization is not None:
        # Representative images come one at a time; a fixed batch is filled with copies.
        file = quantized_model(file, quantization, backbone_scope(detector), images, batch_size)
    foreign = [name for name in metadata.operators(file) if name in ("CUSTOM", "DELEGATE")]
    if foreign:
        raise RuntimeError(f"The file needs operations that are not built in: {foreign}.")
    description = {
        "outputs": {**_LABELS, **({"anomaly_map": _MAP_LABEL} if detector.is_local else {})},
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
    return metadata.described(file, description, placeholders)


def _answer(detector, calibration, shape):
    """As `Detector.call`, with a calibration that can be found, and rewritten, in the file."""
    images = tf.TensorSpec([*shape, 3], tf.uint8, name="images")

    @tf.function(input_signature=[images], autograph=False)
    def answer(images):
        found = detector.scores(detector.extractor(images), _WHOLE_BANK)
        score = snapped(found["ood_score"], calibration["scores"], detector.rounding)
        # A score that is not a number has the lowest p-value, as no comparison with it holds.
        as_high = calibration["scores"][np.newaxis, :] >= score[:, tf.newaxis]
        count = tf.reduce_sum(tf.cast(as_high, tf.int32), axis=1)
        # A table, as the converter would make a division by a constant a less exact product.
        p_value = tf.gather(calibration["p_values"], count)
        answers = {"ood_score": score, "p_value": p_value, "is_ood": p_value <= calibration["rate"]}
        if detector.is_local:
            answers["anomaly_map"] = lowered(found["anomaly_map"], score)
        return answers

    return answer


def _scores(file, images, batch_size, verbose):
    """Return scores that the file gives, float32 `(N,)`."""
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


def _check(file, folder, reference, images, quantization, batch_size):
    """Run the file apart, compare it with the detector, and write both to the folder."""
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


def _in_float32(detector):
    """The detector itself or, of one in mixed precision, a copy: TFLite has no such operations."""
    config = detector.get_config()
    float_config = _with_float32_policies(config)
    if float_config == config:
        return detector
    copy = type(detector).from_config(float_config)
    copy.set_weights(detector.get_weights())
    return copy


def _with_float32_policies(config):
    if isinstance(config, (list, tuple)):
        return type(config)(_with_float32_policies(value) for value in config)
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {**config["config"], "name": "float32"}}
    return {key: _with_float32_policies(value) for key, value in config.items()}
