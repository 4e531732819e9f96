"""Export a detector as a SavedModel for TensorFlow Serving."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf.export import signatures, warmup
from sddns_tf.export.verify import (
    CHECKED_IMAGES,
    COSINE_TOLERANCE,
    check_answers,
    check_features,
    images_or_synthetic,
    resolution,
    run_apart,
    save,
    temporary_folder_in,
)
from sddns_tf.files import sha256
from sddns_tf.types import Array
from sddns_tf.validation import check_bool, check_int
from sddns_tf.version import __version__

# As on a server: without Keras and this package, and with the session loader, which TensorFlow
# Serving uses and which is stricter than `tf.saved_model.load`.
_RUN_SAVED_MODEL = """
import sys
sys.modules["keras"] = sys.modules["sddns_tf"] = None
import numpy as np
import tensorflow as tf
images = np.load("images.npy")
encoded = [tf.io.encode_png(image).numpy() for image in images]
feeds = {"images": images, "image_bytes": encoded, "false_positive_rate": np.load("rates.npy")}
answers = {}
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], "export")
    for name, signature in loaded.signature_def.items():
        if name.startswith("__"):
            continue
        inputs = {tensor.name: feeds[key] for key, tensor in signature.inputs.items()}
        fetches = {key: tensor.name for key, tensor in signature.outputs.items()}
        for key, value in session.run(fetches, inputs).items():
            answers[f"{name}.{key}"] = value.astype("S") if value.dtype == object else value
np.savez("answers.npz", **answers)
"""


def saved_model(
    detector: Any,
    directory: str | os.PathLike,
    version: int | None = None,
    images: Array | None = None,
    *,
    include_features: bool = False,
    max_pixels: int = 64_000_000,
    training_data: str | None = None,
) -> pathlib.Path:
    """Write a detector as a SavedModel that TensorFlow Serving loads.

    The signatures take batches of any size B, at least one image:

    - `serving_default`: takes `images`, uint8 `(B, H, W, 3)` of any height and width, and returns
      `ood_score`, `p_value` and `is_ood`, each `(B,)`, as the detector does.
    - `serving_bytes`: takes `image_bytes`, string `(B,)`, JPEG, PNG, BMP or GIF files, which may
      have different sizes. The first frame of an animated GIF is used, and EXIF orientation is not
      applied. Returns the same, and `status`, string `(B,)`, which is empty if the file was
      decoded. Otherwise it gives the reason: not an image, damaged, of a kind that TensorFlow does
      not decode correctly, or too many pixels. The score is then NaN, the p-value the lowest
      possible, and `is_ood` true. The other files of the batch are not affected.
    - `serving_at_rate` and `serving_bytes_at_rate`: the same with one more input,
      `false_positive_rate`, float32 `(B,)`, instead of the detector's own. If a rate is too small
      for the number of calibration images, or not below 1, `status` says so and `is_ood` is true.
    - `features`: takes `images` as above and returns `features`, float32 `(B, D)`,
      of L2 norm 1 unless they are standardized.

    For a local detector all answers with a score also include `anomaly_map`, float32 `(B, h, w)`,
    which is NaN if a file was not decoded, and `features` are maps `(B, h, w, C)`.

    The folder `assets.extra` holds warm-up requests for the server, and `metadata.json` with the
    versions of packages, the detector's configuration and calibration, the result of the comparison
    below, and the size and SHA-256 of each file.

    Before the export is moved into place, it is loaded in a separate process and compared with the
    detector. It appears in the directory in one step and complete, so a server may watch it.

    Args:
        detector: A `Detector`.
        directory: Path of the served model, which holds a numbered directory for each version.
            Its last part is the name under which the model is served.
        version: Positive int. Defaults to one more than the highest version in `directory`.
        images: Real images to compare on, uint8 `(N, H, W, 3)`, of which the first 16 are used.
            Defaults to synthetic images.
        include_features: Whether the answers include `features`, float32 `(B, D)`.
        max_pixels: Positive int. Image files with more pixels, according to their header, are not
            decoded. Resizing a file takes about 30 bytes of memory per pixel.
        training_data: Description of the training data, for `metadata.json`, or None.

    Returns:
        `pathlib.Path` of the directory written, `directory/<version>`.

    Raises:
        FileExistsError: If the version exists already, which is left unchanged, or `directory` is
            a version itself.
        RuntimeError: If what was written does not run, or does not agree with the detector:
            scores may differ by 4e-6 / temperature (1e-4 at the default temperature; 8 times as
            much where features are standardized, 80 times where places are aligned), for a
            backbone in mixed precision by its rounding error / temperature, and for anomaly maps
            as `verify.check_answers` says. P-values and decisions must be exactly those of the
            exported score, which must be the maximum of the anomaly map. Nothing is left behind.
        ValueError: If the version or `max_pixels` is not a positive int, or the images are not
            uint8 images.

    Example:
    >>> sddns_tf.export.saved_model(detector, "exports/parts", images=test_images)
    PosixPath('exports/parts/1')
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    chosen = version is not None
    version = version if version is not None else _next_version(directory)
    check_int("version", version)
    check_int("max_pixels", max_pixels)
    check_bool("include_features", include_features)
    if (directory / "saved_model.pb").exists():
        raise FileExistsError(
            "`directory` must be the folder that holds the versions. "
            f"Received: {directory}, which is a version"
        )
    target = directory / str(version)
    taken = FileExistsError(
        "`version` must be a new one; without it the next number is taken. "
        f"Received: {target}, which exists"
    )
    if target.exists():
        raise taken
    checked = images_or_synthetic(detector, images)[:CHECKED_IMAGES]
    with temporary_folder_in(directory) as folder:
        export = folder / "export"
        save(export, detector, signatures.signatures(detector, max_pixels, include_features))
        check = _compared(detector, folder, checked)
        check["images"] = f"{len(checked)} {'synthetic' if images is None else 'given'}"
        extra = export / "assets.extra"
        extra.mkdir()
        warmup.write(extra, directory.name, _warmup_requests(detector, checked))
        metadata = {
            "name": directory.name,
            "version": version,
            "training_data": training_data,
            "max_pixels": max_pixels,
            "self_check": check,
            **_description(detector),
            "files": _files(export),
        }
        while True:
            (extra / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
            try:
                os.rename(export, target)
                return target
            except OSError:
                if not target.exists():
                    raise
            if chosen:
                raise taken from None
            # Another export has taken the number meanwhile.
            metadata["version"] = _next_version(directory)
            target = directory / str(metadata["version"])


def _next_version(directory: pathlib.Path) -> int:
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return max([int(name) for name in names if name.isdecimal()], default=0) + 1


def _compared(detector: Any, folder: pathlib.Path, images: np.ndarray) -> dict[str, Any]:
    """Return the largest differences between an export and the detector, if all are allowed."""
    np.save(folder / "rates.npy", np.full(len(images), detector.false_positive_rate, np.float32))
    answers = run_apart(_RUN_SAVED_MODEL, folder, images)
    with tf.device("CPU:0"):  # Where the export ran too.
        expected = detector(images)["p_value"].numpy()
    scores: list[float] = []
    p_values: list[float] = []
    for name in ("serving_default", "serving_bytes", "serving_at_rate", "serving_bytes_at_rate"):
        scores.append(check_answers(detector, images, answers, f"{name}.", COSINE_TOLERANCE[None]))
        p_values.append(np.max(np.abs(answers[f"{name}.p_value"] - expected)))
        if np.any(answers.get(f"{name}.status", b"") != b""):
            raise RuntimeError(
                "What was written does not take images that it should, so it was discarded. "
                f"Received: {name}, status={answers[f'{name}.status'].tolist()}"
            )
    check_features(detector, images, answers["features.features"])
    return {
        "largest_difference_of_ood_score": float(np.max(scores)),
        "largest_difference_of_p_value": float(np.max(p_values)),
    }


def _warmup_requests(detector: Any, images: np.ndarray) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield requests of one image and of four images for every signature."""
    for count in (1, 4):
        batch = np.resize(images, (count, *images.shape[1:]))
        files = np.array([tf.io.encode_jpeg(image).numpy() for image in batch], object)
        rate = np.full(count, detector.false_positive_rate, np.float32)
        yield "serving_default", {"images": batch}
        yield "serving_bytes", {"image_bytes": files}
        yield "serving_at_rate", {"images": batch, "false_positive_rate": rate}
        yield "serving_bytes_at_rate", {"image_bytes": files, "false_positive_rate": rate}
        yield "features", {"images": batch}


def _description(detector: Any) -> dict[str, Any]:
    """Return the description of a detector for `metadata.json`."""
    packages = ("keras", "numpy", "tensorflow")
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": {
            "python": platform.python_version(),
            "sddns_tf": __version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "false_positive_rate": detector.false_positive_rate,
        "threshold": detector.threshold,
        "lowest_score": detector.lowest_score,
        "map_size": detector.extractor.map_size,
        "calibration_size": detector.calibration_scores.shape[0],
        "bank_size": detector.bank.shape[0],
        "feature_dimension": detector.bank.shape[1],
        "resolution": resolution(detector),
        "configuration": detector.get_config(),
    }


def _files(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return the size and checksum of each file in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in paths
    }
