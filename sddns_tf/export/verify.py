"""Check an export: write it to a temporary folder, run it, compare it, then move it into place.

The export is run in a separate process without Keras and compared with the detector before it is
moved into place. So it is either complete and correct, or not there at all.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.aligned import REGULARIZATION
from sddns_tf.types import Array
from sddns_tf.validation import image_array

# Allowed error of a cosine in an export. Divided by the temperature it bounds the error of a score:
# at 0.04 that is 1e-4, 0.025, 0.25 and 0.5. The largest errors of scores measured on photographs,
# with vision transformers of 2, 6 and 12 blocks, were 8e-6, 0.004, 0.083 and, on the representative
# images, 0.22.
COSINE_TOLERANCE = {None: 4e-6, "float16": 1e-3, "dynamic": 1e-2, "int8": 2e-2}
# Allowed error with standardized features, as those of maps are, as a multiple of that without:
# standardizing divides channels by their deviation, which may be small compared with the values
# that were rounded.
_STANDARDIZED = 8
# The same for aligned detectors, whose whitening multiplies errors by up to this much more.
_ALIGNED = _STANDARDIZED / REGULARIZATION**0.5
# Rounding error of a squared length, in units of its last bit: 0.9 was measured.
_LAST_BITS = 4
CHECKED_IMAGES = 16


@contextlib.contextmanager
def temporary_folder_in(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Make a hidden folder in `directory`, and remove it at the end with all it still contains.

    `directory` and its parents are removed as well if they were created here and are empty.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as folder:
            yield pathlib.Path(folder)
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # Fails for a folder that is not empty, as after success.


def save(path: pathlib.Path, detector: Any, signatures: Mapping[str, Callable]) -> None:
    """Write a SavedModel with these signatures that stores each variable once."""
    # A module with the detector as an attribute would store the variables under names that the
    # session loader does not find. The functions only need the variables to be tracked.
    module = tf.Module()
    module.detector_variables = [weight.value for weight in detector.weights]
    tf.saved_model.save(module, str(path), signatures=signatures)


def resolution(detector: Any) -> tuple[int, int]:
    """Return the size to which the detector resizes images first."""
    return detector.extractor.resolution or detector.extractor.image_size


def images_or_synthetic(detector: Any, images: Array | None, name: str = "images") -> np.ndarray:
    """Return checked uint8 images to compare on: the given ones or, without any, synthetic ones."""
    if images is None:
        return _synthetic_images(resolution(detector))
    images = image_array(images, name)
    whole = images.astype(np.uint8)
    if not np.array_equal(whole, images):
        raise ValueError(
            f"`{name}` must be uint8 or whole numbers, because exports take uint8. Received: "
            f"shape={images.shape}, dtype={images.dtype} with fractions"
        )
    return whole


def _synthetic_images(size: tuple[int, int]) -> np.ndarray:
    """Return a fixed set of colored gradients with increasing noise."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(CHECKED_IMAGES, 3, 2))
    rows, columns = (np.linspace(-1.0, 1.0, length) for length in size)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    gradients = np.einsum("ncd,dhw->nhwc", directions, grid)
    noise = generator.normal(size=gradients.shape)
    share = np.linspace(0.0, 1.0, CHECKED_IMAGES)[:, np.newaxis, np.newaxis, np.newaxis]
    mixed = 128.0 + 64.0 * ((1.0 - share) * gradients + share * noise)
    return np.clip(mixed, 0.0, 255.0).astype(np.uint8)


def run_apart(program: str, folder: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Run the export in `folder` on images, in a new Python process on the CPU."""
    np.save(folder / "images.npy", images)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        # This process may have taken all memory of the GPU.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        raise RuntimeError(
            "What was written does not run in a separate process, so it was discarded. "
            f"Received:\n{result.stderr[-2000:]}"
        )
    with np.load(folder / "answers.npz") as answers:
        return dict(answers)


def score_tolerance(detector: Any, tolerance: float) -> float:
    """Return the allowed error of a score, given that of a cosine."""
    tolerance = max(tolerance, _rounding(detector)) * detector.steepness
    if detector.extractor.aligned:
        return tolerance * _ALIGNED
    return tolerance * (_STANDARDIZED if detector.extractor.standardized else 1)


def check_answers(
    detector: Any, images: Array, answers: dict[str, Array], prefix: str, tolerance: float
) -> float:
    """Raise a `RuntimeError` unless answers agree with the detector's.

    Args:
        detector: The `Detector`.
        images: The images that were scored.
        answers: Dict of arrays whose names begin with `prefix`.
        prefix: String.
        tolerance: Allowed error of a cosine: see `score_tolerance`. Distances between standardized
            features are not bounded, and their rounding error grows with them. Such a score `s`
            may therefore differ by `1 + temperature * (s - lowest score)` times as much, and by the
            rounding of features far from the bank's mean, which may be in the bank all the same.

    Returns:
        The largest difference of a score.
    """
    answers = {
        key.removeprefix(prefix): value for key, value in answers.items() if key.startswith(prefix)
    }
    scores, p_values, is_ood = (answers[name] for name in ("ood_score", "p_value", "is_ood"))
    with tf.device("CPU:0"):  # Where the export ran too; GPUs multiply matrices less precisely.
        features = detector.features(images)
        expected = {name: value.numpy() for name, value in detector.answer(features).items()}
    tolerance = score_tolerance(detector, tolerance)
    calibration = detector.calibration_scores.numpy()
    counts = np.count_nonzero(calibration >= scores[:, np.newaxis], axis=1)
    is_above = ~(scores <= np.float32(detector.threshold))
    # Differences of each kind, and how large they may be.
    checks = {
        "score": (_off(detector, scores, expected["ood_score"], features), tolerance),
        "p-value, given its score,": (
            np.abs(p_values - (1 + counts) / (1 + len(calibration))),
            1e-6,
        ),
        "decision, given its score,": (is_ood != is_above, 0),
    }
    if detector.is_local:
        maps = answers["anomaly_map"]
        checks["anomaly map"] = (_off(detector, maps, expected["anomaly_map"], features), tolerance)
        checks["score, compared with the maximum of its map,"] = (
            scores != maps.max(axis=(1, 2)),
            0,
        )
    for name, (difference, bound) in checks.items():
        _check_difference(prefix + name, np.max(difference), bound, len(images))
    return np.max(np.abs(scores - expected["ood_score"]))


def _off(detector: Any, scores: Array, expected: Array, features: Array) -> np.ndarray:
    """Return errors of scores; where distances are compared, relative to that from the bank."""
    difference = np.abs(scores - expected)
    if not detector.extractor.standardized:
        return difference
    # A distance is a difference of squared lengths, each rounded to so many of its last bits.
    squares = np.square(features).mean(axis=-1)
    largest = squares.reshape(len(squares), -1).max(axis=1)
    rounding = _LAST_BITS * np.finfo(np.float32).eps * largest / detector.temperature
    rounding = rounding.reshape(-1, *[1] * (difference.ndim - 1))
    room = 1.0 + detector.temperature * (expected - detector.lowest_score)
    return np.maximum(difference - rounding, 0.0) / room


def check_features(detector: Any, images: Array, features: Array) -> None:
    """Raise a `RuntimeError` unless features agree with the detector's."""
    with tf.device("CPU:0"):
        expected = detector.features(images).numpy()
    # Values of standardized features are not bounded.
    bound = max(1e-4, _rounding(detector)) * max(1.0, np.abs(expected).max())
    _check_difference("features", np.max(np.abs(features - expected)), bound, len(images))


def _check_difference(name: str, difference: float, bound: float, count: int) -> None:
    if not difference <= bound:  # NaN fails as well.
        raise RuntimeError(
            "What was written does not agree with the detector, so it was discarded: its "
            f"{name} may differ by at most {bound:.3g}. "
            f"Received: a difference of {difference:.3g} over {count} images"
        )


def _rounding(detector: Any) -> float:
    """Return the relative rounding error of a backbone that does not compute in float32, else 0."""
    precisions = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
    return precisions.get(detector.extractor.backbone.compute_dtype, 0.0)
