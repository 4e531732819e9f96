"""A detector as one `.tflite` file for edge devices."""

import os
import pathlib
import re
import warnings

import tensorflow as tf

from sddns_tf.export_checks import (
    CHECKED_IMAGES,
    COSINE_TOLERANCE,
    answer_images,
    check_answers,
    images_or_synthetic,
    resolution,
    run_apart,
    save,
    temporary_folder_in,
)

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
    if quantization not in COSINE_TOLERANCE:
        raise ValueError(
            f"`quantization` must be one of {list(COSINE_TOLERANCE)}. Received: {quantization!r}."
        )
    if quantization == "int8" and representative_images is None:
        raise ValueError(
            '`quantization="int8"` needs `representative_images`, which fix the ranges of '
            'activations. Without them use "dynamic". Received: representative_images=None.'
        )
    if quantization is not None:
        _import_quantizer()
    size = resolution(detector)
    images = images_or_synthetic(detector, representative_images)
    if images.shape[1:3] != size:
        raise ValueError(
            f"`representative_images` must be at the in-distribution's resolution, (N, {size[0]}, "
            f"{size[1]}, 3). Received: shape={images.shape}."
        )
    path = pathlib.Path(path).expanduser()
    with temporary_folder_in(path.parent) as folder:
        float_detector = _in_float32(detector)
        signatures = {"serving_default": answer_images(float_detector, size)}
        save(folder / "saved_model", float_detector, signatures)
        # No Flex or custom operations: the converter refuses them unless they are asked for.
        model = tf.lite.TFLiteConverter.from_saved_model(
            str(folder / "saved_model"), signature_keys=["serving_default"]
        ).convert()
        if quantization is not None:
            model = _quantized(model, quantization, _backbone_scope(float_detector), images)
        (folder / "export").write_bytes(model)
        images = images[:CHECKED_IMAGES]
        answers = run_apart(_RUN_TFLITE, folder, images)
        check_answers(detector, images, answers, "", COSINE_TOLERANCE[quantization])
        os.replace(folder / "export", path)
    return path


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
