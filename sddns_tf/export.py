"""A detector as a SavedModel for TensorFlow Serving or as one `.tflite` file.

Either carries everything: resizing, normalization, backbone, bank, score and calibration. What was
written is run in a process of its own, without Keras, and compared with the detector before it
gets its name: an export is whole and right, or it is not there.
"""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import tensorflow as tf

from sddns_tf import image_ops
from sddns_tf.bank import check_images

# By how much a cosine may be off in an export. Divided by the temperature it bounds the score: at
# 0.04 these are 1e-4, 0.025, 0.25 and 0.5. Measured over photographs, on vision transformers of 2,
# 6 and 12 blocks, were at most 8e-6, 0.004, 0.083 and, over the representative images, 0.22.
_COSINE_TOLERANCE = {None: 4e-6, "float16": 1e-3, "dynamic": 1e-2, "int8": 2e-2}
_CHECKED_IMAGES = 16

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

_RUN_TFLITE = """
import sys
import numpy as np
try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    sys.modules["keras"] = sys.modules["sddns_tf"] = None
    import tensorflow as tf
    Interpreter = tf.lite.Interpreter
runner = Interpreter("export").get_signature_runner("serving_default")
np.savez("answers.npz", **runner(images=np.load("images.npy")))
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
    images = _images_or_synthetic(detector, images)[:_CHECKED_IMAGES]
    with _temporary_folder_in(directory) as folder:
        _save(folder / "export", detector, _signatures(detector))
        answers = _run_apart(_RUN_SAVED_MODEL, folder, images)
        for signature in ("serving_default", "serving_bytes"):
            _check_answers(detector, images, answers, f"{signature}.", _COSINE_TOLERANCE[None])
        _check_features(detector, images, answers["features.features"])
        os.rename(folder / "export", target)
    return target


def tflite(detector, path, quantization=None, representative_images=None):
    """Write a detector as one `.tflite` file of built-in operations.

    Its signature `serving_default` takes `images`, uint8 `(B, h, w, 3)` for any B, already at the
    resolution of the in-distribution (`detector.extractor.resolution`), and gives `ood_score`,
    `p_value` and `is_ood`, each `(B,)`. It runs in `ai_edge_litert` without TensorFlow.

    Quantization is that of the backbone's dense layers and convolutions; everything else,
    bank, score and calibration above all, stays float32. The p-values are those of the float
    detector's calibration scores. `"dynamic"` is the one to try first on a CPU: the smallest, as
    fast as `"int8"` and much closer to the detector. A backbone in mixed precision is exported
    in float32.

    Args:
        detector: A `Detector`.
        path: Path of the file to write. A file of that name is replaced, at once and whole.
        quantization: None for float32; `"float16"` stores weights as float16 and computes in
            float32; `"dynamic"` has int8 weights and quantizes activations image by image;
            `"int8"` has int8 weights and activations, in ranges fixed by representative images.
        representative_images: uint8 `(N, h, w, 3)`, about a hundred, at the in-distribution's
            resolution, needed for `"int8"`. Activations beyond their range saturate, so let them
            vary as much as what is to be scored. The first 16 serve for the comparison, which
            otherwise is made on synthetic images.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ImportError: If `ai-edge-quantizer`, needed for every quantization, is not installed.
        RuntimeError: If what was written does not run, or does not agree with the detector:
            as for `saved_model`, with 1e-3 (`"float16"`), 1e-2 (`"dynamic"`) or 2e-2 (`"int8"`)
            in place of 4e-6. Nothing is left behind.
        ValueError: If the quantization is unknown, `"int8"` lacks representative images, or they
            have a wrong dtype or shape.

    Example:
    >>> sddns_tf.export.tflite(detector, "parts.tflite", quantization="dynamic")
    PosixPath('parts.tflite')
    """
    if quantization not in _COSINE_TOLERANCE:
        raise ValueError(
            f"`quantization` must be one of {list(_COSINE_TOLERANCE)}. Received: {quantization!r}."
        )
    if quantization == "int8" and representative_images is None:
        raise ValueError(
            '`quantization="int8"` needs `representative_images`, which fix the ranges of '
            'activations. Without them use "dynamic". Received: representative_images=None.'
        )
    if quantization is not None:
        _import_quantizer()
    size = _resolution(detector)
    images = _images_or_synthetic(detector, representative_images)
    if images.shape[1:3] != size:
        raise ValueError(
            f"`representative_images` must be at the in-distribution's resolution, (N, {size[0]}, "
            f"{size[1]}, 3). Received: shape={images.shape}."
        )
    path = pathlib.Path(path).expanduser()
    with _temporary_folder_in(path.parent) as folder:
        float_detector = _in_float32(detector)
        signatures = {"serving_default": _answer_images(float_detector, size)}
        _save(folder / "saved_model", float_detector, signatures)
        # No Flex or custom operations: the converter refuses them unless they are asked for.
        model = tf.lite.TFLiteConverter.from_saved_model(
            str(folder / "saved_model"), signature_keys=["serving_default"]
        ).convert()
        if quantization is not None:
            model = _quantized(model, quantization, _backbone_scope(float_detector), images)
        (folder / "export").write_bytes(model)
        images = images[:_CHECKED_IMAGES]
        answers = _run_apart(_RUN_TFLITE, folder, images)
        _check_answers(detector, images, answers, "", _COSINE_TOLERANCE[quantization])
        os.replace(folder / "export", path)
    return path


def _next_version(directory):
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return max([int(name) for name in names if name.isdecimal()], default=0) + 1


@contextlib.contextmanager
def _temporary_folder_in(directory):
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


# --- Signatures ---------------------------------------------------------------------------------


def _save(path, detector, signatures):
    # A module that held the detector itself would store its variables under names that the
    # session loader does not find. The functions need no more than the variables to be held.
    module = tf.Module()
    module.detector_variables = [weight.value for weight in detector.weights]
    tf.saved_model.save(module, str(path), signatures=signatures)


def _signatures(detector):
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")

    @tf.function(input_signature=[images], autograph=False)
    def features(images):
        return {"features": detector.features(images)}

    return {
        "serving_default": _answer_images(detector, (None, None)),
        "serving_bytes": _answer_bytes(detector),
        "features": features,
    }


def _answer_images(detector, size):
    images = tf.TensorSpec([None, *size, 3], tf.uint8, name="images")
    return tf.function(lambda images: detector(images), input_signature=[images], autograph=False)


def _answer_bytes(detector):
    size = _resolution(detector)

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


def _resolution(detector):
    """The size at which an image shows all that the detector sees of it."""
    return detector.extractor.resolution or detector.extractor.image_size


# --- TFLite --------------------------------------------------------------------------------------


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


def _import_quantizer():
    try:
        from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
        from ai_edge_quantizer.utils import qsv_utils
    except ImportError as error:
        raise ImportError(
            "Quantization needs the package `ai-edge-quantizer`: `pip install sddns_tf[tflite]`."
        ) from error
    return calibrator, qtyping, quantizer, recipe_manager, qsv_utils


def _backbone_scope(detector):
    """Regular expression for the names that the backbone's operations have in the graph."""
    names = (detector.extractor.name, detector.extractor.backbone.name)
    return "".join(rf"{re.escape(name)}(_\d+)?/" for name in names)


def _quantized(model, quantization, scope, images):
    """A TFLite model whose dense layers and convolutions within a scope are quantized.

    TensorFlow's own converter would quantize the bank as well, which makes the score's error two
    to five times as large. Products of activations stay float: slower and worse as integers.
    """
    _, qtyping, quantizer, recipe_manager, _ = _import_quantizer()
    float16 = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=16, dtype=qtyping.TensorDataType.FLOAT
        ),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    recipe = recipe_manager.RecipeManager()
    for name in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"):
        operation = qtyping.TFLOperationName(name)
        if quantization == "float16":
            recipe.add_quantization_config(scope, operation, float16, "float_casting")
        elif quantization == "dynamic":
            recipe.add_dynamic_config(scope, operation, num_bits=8)
        else:
            recipe.add_static_config(scope, operation, activation_num_bits=8, weight_num_bits=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors.*")
        ranges = _activation_ranges(model, recipe, images) if quantization == "int8" else None
        quantized = quantizer.Quantizer(model, recipe.get_quantization_recipe()).quantize(
            ranges, enable_progress_bar=False, enable_progress_report=False
        )
    if len(quantized.quantized_model) >= len(model):
        raise RuntimeError(
            f'Quantization "{quantization}" does not make the model smaller: its backbone has '
            f"hardly any dense layers or convolutions. Received: {len(model)} bytes before, "
            f"{len(quantized.quantized_model)} after."
        )
    return bytes(quantized.quantized_model)


def _activation_ranges(model, recipe, images):
    """Smallest and largest value of each tensor to be quantized, over all images.

    The quantizer by itself takes a moving average over batches instead, which cuts off the
    extremes and makes the score's error eight times as large.
    """
    calibrator, _, _, _, qsv_utils = _import_quantizer()
    calibration = calibrator.Calibrator(
        model, num_threads=1, qsv_update_func=qsv_utils.min_max_update
    )
    # One image at a time: a larger batch is thirty times as slow for an image.
    batches = [{"images": images[i : i + 1]} for i in range(len(images))]
    calibration.calibrate({"serving_default": batches}, recipe)
    return calibration.get_model_qsvs()


# --- Comparison with the detector ---------------------------------------------------------------


def _images_or_synthetic(detector, images):
    if images is None:
        return _synthetic_images(_resolution(detector))
    images = np.asarray(images)
    check_images(images)
    if images.dtype != np.uint8 or not len(images):
        raise ValueError(
            "Images to export with must be uint8, and at least one. "
            f"Received: shape={images.shape}, dtype={images.dtype}."
        )
    return images


def _synthetic_images(size):
    """Coloured gradients in all directions under more and more noise, always the same."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(_CHECKED_IMAGES, 3, 2))
    rows, columns = (np.linspace(-1.0, 1.0, length) for length in size)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    gradients = np.einsum("ncd,dhw->nhwc", directions, grid)
    noise = generator.normal(size=gradients.shape)
    share = np.linspace(0.0, 1.0, _CHECKED_IMAGES)[:, np.newaxis, np.newaxis, np.newaxis]
    mixed = 128.0 + 64.0 * ((1.0 - share) * gradients + share * noise)
    return np.clip(mixed, 0.0, 255.0).astype(np.uint8)


def _run_apart(program, folder, images):
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


def _check_answers(detector, images, answers, prefix, tolerance):
    scores, p_values, is_ood = (
        answers[prefix + name] for name in ("ood_score", "p_value", "is_ood")
    )
    with tf.device("CPU:0"):  # As the export was: GPUs multiply matrices less precisely.
        expected = detector(images)["ood_score"].numpy()
    tolerance = max(tolerance, _rounding(detector)) / detector.temperature
    calibration = detector.calibration_scores.numpy()
    counts = np.count_nonzero(calibration >= scores[:, np.newaxis], axis=1)
    differences = {
        "score": (np.max(np.abs(scores - expected)), tolerance),
        "p-value from that of its score": (
            np.max(np.abs(p_values - (1 + counts) / (1 + len(calibration)))),
            1e-6,
        ),
        "decision from that of its score": (
            np.max(is_ood != ~(scores <= np.float32(detector.threshold))),
            0,
        ),
    }
    for name, (difference, bound) in differences.items():
        _check_difference(prefix + name, difference, bound, len(images))


def _check_features(detector, images, features):
    with tf.device("CPU:0"):
        expected = detector.features(images).numpy()
    bound = max(1e-4, _rounding(detector))
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
