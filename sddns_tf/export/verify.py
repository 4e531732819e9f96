"""What every export goes through: written aside, run apart, compared, then renamed into place.

What was written is run in a process of its own, without Keras, and compared with the detector
before it gets its name: an export is whole and right, or it is not there.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow as tf

from sddns_tf.validation import image_array

# By how much a cosine may be off in an export. Divided by the temperature it bounds the score: at
# 0.04 these are 1e-4, 0.025, 0.25 and 0.5. Measured over photographs, on vision transformers of 2,
# 6 and 12 blocks, were at most 8e-6, 0.004, 0.083 and, over the representative images, 0.22.
COSINE_TOLERANCE = {None: 4e-6, "float16": 1e-3, "dynamic": 1e-2, "int8": 2e-2}
# A channel of a map is divided by its deviation, which may be small beside what was rounded.
_PLACES = 8
CHECKED_IMAGES = 16


@contextlib.contextmanager
def temporary_folder_in(directory):
    """A hidden folder in `directory`; what is still in it in the end is removed.

    So is `directory` itself, with parents, if it was made here and nothing came to lie in it.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as folder:
            yield pathlib.Path(folder)
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()  # Refused for a folder that is not empty, as after a success.


def save(path, detector, signatures):
    """Write a SavedModel with these signatures, each variable of the detector stored once."""
    # A module that held the detector itself would store its variables under names that the
    # session loader does not find. The functions need no more than the variables to be held.
    module = tf.Module()
    module.detector_variables = [weight.value for weight in detector.weights]
    tf.saved_model.save(module, str(path), signatures=signatures)


def answer_images(detector, size):
    """Return a function from uint8 images of a size, which may be (None, None), to the answers."""
    images = tf.TensorSpec([None, *size, 3], tf.uint8, name="images")
    return tf.function(lambda images: detector(images), input_signature=[images], autograph=False)


def resolution(detector):
    """Return the size at which an image shows all that the detector sees of it."""
    return detector.extractor.resolution or detector.extractor.image_size


def images_or_synthetic(detector, images, name="images"):
    """Return a user's own images to compare on, checked and uint8, or made-up ones."""
    if images is None:
        return _synthetic_images(resolution(detector))
    images = image_array(images, name)
    whole = images.astype(np.uint8)
    if not np.array_equal(whole, images):
        raise ValueError(
            f"`{name}` must be uint8, as exports take them, or whole numbers. Received: "
            f"shape={images.shape}, dtype={images.dtype} with fractions"
        )
    return whole


def _synthetic_images(size):
    """Return colored gradients in all directions under more and more noise, always the same."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(CHECKED_IMAGES, 3, 2))
    rows, columns = (np.linspace(-1.0, 1.0, length) for length in size)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    gradients = np.einsum("ncd,dhw->nhwc", directions, grid)
    noise = generator.normal(size=gradients.shape)
    share = np.linspace(0.0, 1.0, CHECKED_IMAGES)[:, np.newaxis, np.newaxis, np.newaxis]
    mixed = 128.0 + 64.0 * ((1.0 - share) * gradients + share * noise)
    return np.clip(mixed, 0.0, 255.0).astype(np.uint8)


def run_apart(program, folder, images):
    """Run the export in `folder` on images in a fresh Python process, on the CPU."""
    np.save(folder / "images.npy", images)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        # This process may hold all memory of a GPU.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode:
        raise RuntimeError(
            "What was written does not run in a process of its own, so it was discarded. "
            f"Received:\n{result.stderr[-2000:]}"
        )
    with np.load(folder / "answers.npz") as answers:
        return dict(answers)


def score_tolerance(detector, tolerance):
    """Tell by how much a score may be off where a cosine may be by `tolerance`."""
    tolerance = max(tolerance, _rounding(detector)) / detector.temperature
    return tolerance * (_PLACES if detector.is_local else 1)


def check_answers(detector, images, answers, prefix, tolerance):
    """Raise RuntimeError unless answers agree with the detector's.

    Args:
        detector: The `Detector`.
        images: The images that were answered for.
        answers: Dict of arrays, under names that begin with `prefix`.
        prefix: String.
        tolerance: By how much a cosine may be off: see `score_tolerance`. Distances of standardized
            features have no largest value, and their rounding grows with them: at a score of `s` a
            place may be off by `1 + temperature * (s - lowest score)` times as much.

    Returns:
        The largest difference of a score.
    """
    answers = {
        key.removeprefix(prefix): value for key, value in answers.items() if key.startswith(prefix)
    }
    scores, p_values, is_ood = (answers[name] for name in ("ood_score", "p_value", "is_ood"))
    with tf.device("CPU:0"):  # As the export was: GPUs multiply matrices less precisely.
        expected = {name: value.numpy() for name, value in detector(images).items()}
    tolerance = score_tolerance(detector, tolerance)
    calibration = detector.calibration_scores.numpy()
    counts = np.count_nonzero(calibration >= scores[:, np.newaxis], axis=1)
    is_above = ~(scores <= np.float32(detector.threshold))
    # Of each: how far it is off, and how far it may be.
    checks = {
        "score": (_off(detector, scores, expected["ood_score"]), tolerance),
        "p-value from that of its score": (
            np.abs(p_values - (1 + counts) / (1 + len(calibration))),
            1e-6,
        ),
        "decision from that of its score": (is_ood != is_above, 0),
    }
    if detector.is_local:
        maps = answers["anomaly_map"]
        checks["anomaly map"] = (_off(detector, maps, expected["anomaly_map"]), tolerance)
        checks["score from the highest of its map"] = (scores != maps.max(axis=(1, 2)), 0)
    for name, (difference, bound) in checks.items():
        _check_difference(prefix + name, np.max(difference), bound, len(images))
    return np.max(np.abs(scores - expected["ood_score"]))


def _off(detector, scores, expected):
    """Tell how far scores are off; those of places in relation to their distance from the bank."""
    difference = np.abs(scores - expected)
    if not detector.is_local:
        return difference
    return difference / (1.0 + detector.temperature * (expected - detector.lowest_score))


def check_features(detector, images, features):
    """Raise RuntimeError unless features agree with the detector's."""
    with tf.device("CPU:0"):
        expected = detector.features(images).numpy()
    # Standardized maps have no largest value.
    bound = max(1e-4, _rounding(detector)) * max(1.0, np.abs(expected).max())
    _check_difference("features", np.max(np.abs(features - expected)), bound, len(images))


def _check_difference(name, difference, bound, count):
    if not difference <= bound:  # NaN fails as well.
        raise RuntimeError(
            "What was written does not agree with the detector, so it was discarded. Largest "
            f"difference of {name} over {count} images: {difference:.3g}; allowed: {bound:.3g}."
        )


def _rounding(detector):
    """Relative rounding error of what the backbone computes in, where that is not float32."""
    precisions = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
    return precisions.get(detector.extractor.backbone.compute_dtype, 0.0)
