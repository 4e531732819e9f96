"""A detector as a SavedModel for TensorFlow Serving."""

import os
import pathlib

import tensorflow as tf

from sddns_tf import image_ops
from sddns_tf.export_checks import (
    CHECKED_IMAGES,
    COSINE_TOLERANCE,
    answer_images,
    check_answers,
    check_features,
    images_or_synthetic,
    resolution,
    run_apart,
    save,
    temporary_folder_in,
)

# As on a server: neither Keras nor this package, and the session loader, which is the one that
# TensorFlow Serving uses and which is stricter than `tf.saved_model.load`.
_RUN_SAVED_MODEL = """
import sys
sys.modules["keras"] = sys.modules["sddns_tf"] = None
import numpy as np
import tensorflow as tf
images = np.load("images.npy")
encoded = [tf.io.encode_png(image).numpy() for image in images]
feeds = {"serving_default": images, "serving_bytes": encoded, "features": images}
answers = {}
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    loaded = tf.compat.v1.saved_model.loader.load(session, ["serve"], "export")
    for name, feed in feeds.items():
        signature = loaded.signature_def[name]
        (placeholder,) = [tensor.name for tensor in signature.inputs.values()]
        fetches = {key: tensor.name for key, tensor in signature.outputs.items()}
        for key, value in session.run(fetches, {placeholder: feed}).items():
            answers[f"{name}.{key}"] = value
np.savez("answers.npz", **answers)
"""


def saved_model(detector, directory, version=None, images=None):
    """Write a detector as a SavedModel that TensorFlow Serving loads.

    Signatures:

    - `serving_default`: `images`, uint8 `(B, H, W, 3)`, of any height and width, to `ood_score`,
      `p_value` and `is_ood`, each `(B,)`, as the detector gives them.
    - `serving_bytes`: `image_bytes`, string `(B,)`, JPEG, PNG, BMP or GIF files (of which the
      first frame counts) of any sizes in one batch, to the same. One that is not an image fails
      the whole batch with `InvalidArgument`.
    - `features`: `images`, as above, to `features`, float32 `(B, D)` of L2 norm 1.

    The export becomes visible at once and whole, so a server may watch the directory. Before that
    it is loaded in a process of its own and compared with the detector.

    Args:
        detector: A `Detector`.
        directory: Path of the served model, which holds a numbered directory for each version.
        version: Positive int. Defaults to one more than the highest version in `directory`.
        images: None, or some real images to compare on, uint8 `(N, H, W, 3)`; the first 16 are
            used. Defaults to synthetic ones.

    Returns:
        `pathlib.Path` of the directory written, `directory/<version>`.

    Raises:
        FileExistsError: If the version is there already; it stays as it was.
        RuntimeError: If what was written does not run, or does not agree with the detector:
            scores to within 4e-6 / temperature (1e-4 at the default; for a backbone in mixed
            precision, its rounding error / temperature); p-values and decisions must be exactly
            those of the written score. Nothing is left behind.
        ValueError: If the version is not a positive int, or the images are not uint8 images.

    Example:
    >>> sddns_tf.export.saved_model(detector, "exports/parts", images=test_images)
    PosixPath('exports/parts/1')
    """
    directory = pathlib.Path(directory).expanduser()
    version = _next_version(directory) if version is None else version
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"`version` must be a positive int. Received: {version!r}.")
    target = directory / str(version)
    if target.exists():
        raise FileExistsError(f"{target} is there already. Choose another version or none.")
    images = images_or_synthetic(detector, images)[:CHECKED_IMAGES]
    with temporary_folder_in(directory) as folder:
        save(folder / "export", detector, _signatures(detector))
        answers = run_apart(_RUN_SAVED_MODEL, folder, images)
        for signature in ("serving_default", "serving_bytes"):
            check_answers(detector, images, answers, f"{signature}.", COSINE_TOLERANCE[None])
        check_features(detector, images, answers["features.features"])
        os.rename(folder / "export", target)
    return target


def _next_version(directory):
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return max([int(name) for name in names if name.isdecimal()], default=0) + 1


def _signatures(detector):
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")

    @tf.function(input_signature=[images], autograph=False)
    def features(images):
        return {"features": detector.features(images)}

    return {
        "serving_default": answer_images(detector, (None, None)),
        "serving_bytes": _answer_bytes(detector),
        "features": features,
    }


def _answer_bytes(detector):
    size = resolution(detector)

    def decode(image_bytes):
        image = tf.io.decode_image(image_bytes, channels=3, expand_animations=False)
        image = tf.ensure_shape(image, [None, None, 3])
        return image_ops.resize(image[tf.newaxis], *size)[0]

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")], autograph=False
    )
    def answer(image_bytes):
        # Before any is decoded: the decoder's own error would not say which item it is about.
        with tf.control_dependencies([_assert_image_files(image_bytes)]):
            image_bytes = tf.identity(image_bytes)
        # Each image at its own size, so one at a time: decoding is host work anyway.
        spec = tf.TensorSpec([*size, 3], tf.float32)
        return detector(tf.map_fn(decode, image_bytes, fn_output_signature=spec))

    return answer


def _assert_image_files(image_bytes):
    """An assertion that names the items which do not begin as image files do."""
    beginnings = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8")
    matches = [tf.strings.substr(image_bytes, 0, len(text)) == text for text in beginnings]
    wrong = tf.where(~tf.reduce_any(matches, axis=0))[:, 0]
    message = "Not a JPEG, PNG, BMP or GIF file: items of `image_bytes` at"
    return tf.debugging.Assert(tf.equal(tf.size(wrong), 0), [message, wrong], summarize=10)
