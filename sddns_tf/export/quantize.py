"""Quantize the backbone in a `.tflite` file, and nothing else in it."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np


def import_quantizer() -> tuple[Any, ...]:
    """Return the quantizer's modules, or raise an error that says how to install it."""
    try:
        from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe_manager
        from ai_edge_quantizer.utils import qsv_utils
    except ImportError as error:
        raise ImportError(
            "Quantization needs the package `ai-edge-quantizer`: `pip install sddns_tf[tflite]`."
        ) from error
    return calibrator, qtyping, quantizer, recipe_manager, qsv_utils


def backbone_scope(detector: Any) -> str:
    """Return a regular expression for the names of the backbone's operations in the graph."""
    names = (detector.extractor.name, detector.extractor.backbone.name)
    return "".join(rf"{re.escape(name)}(_\d+)?/" for name in names)


def quantized_model(
    model: bytes,
    quantization: str | None,
    scope: str,
    images: np.ndarray,
    batch_size: int | None = None,
) -> bytes:
    """Quantize the dense layers and convolutions within a scope of a TFLite model.

    TensorFlow's own converter would also quantize the bank, which makes the error of the score two
    to five times as large. Products of two activations, as in attention, stay float: as integers
    they are slower and less precise.
    """
    _, qtyping, quantizer, recipe_manager, _ = import_quantizer()
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
        elif quantization == "dynamic" and name != "DEPTHWISE_CONV_2D":
            # XNNPACK has no depthwise convolution with float activations and int8 weights.
            recipe.add_dynamic_config(scope, operation, num_bits=8)
        elif quantization == "int8":
            recipe.add_static_config(scope, operation, activation_num_bits=8, weight_num_bits=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors.*")
        ranges = (
            _activation_ranges(model, recipe, images, batch_size)
            if quantization == "int8"
            else None
        )
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


def _activation_ranges(
    model: bytes, recipe: Any, images: np.ndarray, batch_size: int | None
) -> Any:
    """Return the smallest and largest value of each quantized tensor over all images.

    By default the quantizer takes a moving average over batches, which cuts off the extremes and
    makes the error of the score eight times as large.
    """
    calibrator, _, _, _, qsv_utils = import_quantizer()
    calibration = calibrator.Calibrator(
        model, num_threads=1, qsv_update_func=qsv_utils.min_max_update
    )
    # One image at a time: larger batches take thirty times as long per image.
    shape = (batch_size or 1, *images.shape[1:])
    batches = [{"images": np.resize(image, shape)} for image in images]
    calibration.calibrate({"serving_default": batches}, recipe)
    return calibration.get_model_qsvs()
