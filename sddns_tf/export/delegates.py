"""Which operations of a `.tflite` file an accelerator would leave to the CPU.

Without these lists you would only find out on the device: a delegate runs the operations it
supports, and each switch between it and the CPU costs time. The lists for GPU, Core ML and NNAPI
are what the code of these delegates accepts, at the commit named beside each; that for Edge TPU
follows copies of the vendor's table. The lists compare names only; further requirements are in
`NEEDS`. What a delegate really takes also depends on versions, types, shapes and drivers: try the
file on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

# https://github.com/google-ai-edge/LiteRT at 34ec5badbbbf: `NewOperationParser` in
# tflite/delegates/gpu/common/model_builder.cc. DEQUANTIZE and QUANTIZE need quantized models to be
# allowed, as they are by default (tflite/delegates/gpu/delegate_options.cc at 7d88950ea445). Types
# and shapes are checked in tflite/tools/versioning/gpu_compatibility.cc (007226f498a6). Older
# delegates take less. The documentation (tensorflow/lite/g3doc/performance/gpu_advanced.md in
# https://github.com/tensorflow/tensorflow at 021bfd4e8001) names only 23, all of which are here.
_GPU = """
ABS ADD ADD_N AVERAGE_POOL_2D BATCH_MATMUL CAST CONCATENATION CONV_2D COS CUMSUM DENSIFY
DEPTH_TO_SPACE DEPTHWISE_CONV_2D DEQUANTIZE DIV ELU EQUAL EXP FLOOR FLOOR_DIV FLOOR_MOD
FULLY_CONNECTED GATHER GELU GREATER GREATER_EQUAL HARD_SWISH LEAKY_RELU LESS LESS_EQUAL LOG
LOGICAL_AND LOGISTIC LSTM MAX_POOL_2D MAXIMUM MEAN MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL ONE_HOT PACK
PAD PADV2 POW PRELU QUANTIZE REDUCE_MAX REDUCE_MIN REDUCE_PROD RELU RELU6 RELU_0_TO_1 RELU_N1_TO_1
RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT SELECT SELECT_V2 SIGN SIN SLICE SOFTMAX
SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TILE
TRANSPOSE TRANSPOSE_CONV UNPACK
"""
# https://coral.ai/docs/edgetpu/models-intro/#supported-operations as of compiler 16. The page was
# not at hand, so copies of its table were compared. All 40 names are as in the article "More
# Coral" of September 2024. Those from Add to ResizeBilinear are as in
# https://developer.axis.com/computer-vision/on-device/system-on-chip/artpec-7/supported-ops/
# whose rest was not at hand. EXPAND_DIMS, PACK, QUANTIZE, SUM and TRANSPOSE_CONV need runtime 13
# (CHANGES.md of https://github.com/google-coral/edgetpu at 285cacf0a879); LSTM and TRANSPOSE need
# compiler 16 (issues 156 and 193 there). The LSTM must be unidirectional.
_EDGE_TPU = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D EXPAND_DIMS FULLY_CONNECTED
L2_NORMALIZATION LOGISTIC LSTM MAXIMUM MAX_POOL_2D MEAN MINIMUM MUL PACK PAD PRELU QUANTIZE
REDUCE_MAX REDUCE_MIN RELU RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT
SLICE SOFTMAX SPACE_TO_DEPTH SPLIT SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM TANH TRANSPOSE
TRANSPOSE_CONV
"""
# https://github.com/google-ai-edge/LiteRT at 470f4da9f90a: `IsNodeSupportedByDelegate` in
# tflite/delegates/coreml/coreml_delegate.mm. DEQUANTIZE is added here, because the delegate takes
# that of float16 weights (tflite/delegates/utils.h at 5f747663ec7a). The documentation
# (tensorflow/lite/g3doc/performance/coreml_delegate.md in https://github.com/tensorflow/tensorflow
# at 021bfd4e8001) lacks DEQUANTIZE, MEAN, MIRROR_PAD, PAD and PADV2.
_CORE_ML = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEQUANTIZE FULLY_CONNECTED HARD_SWISH
LOGISTIC MAX_POOL_2D MEAN MIRROR_PAD MUL PAD PADV2 RELU RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR
SOFTMAX TANH TRANSPOSE_CONV
"""
# https://github.com/google-ai-edge/LiteRT at 5c8a6d4b8063: `NNAPIDelegateKernel::Validate` in
# tflite/delegates/nnapi/nnapi_delegate.cc, at API level 30. BATCH_MATMUL, MIRROR_PAD and REVERSE_V2
# need a later one. Older delegates (tensorflow/lite/delegates/nnapi/nnapi_delegate.cc in
# https://github.com/tensorflow/tensorflow at 002e5f47fa2e) lack COS, SPLIT_V, SQUARED_DIFFERENCE
# and UNPACK. The driver of a device may refuse any of them.
_NNAPI = """
ABS ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_TO_SPACE_ND BIDIRECTIONAL_SEQUENCE_LSTM CAST
CONCATENATION CONV_2D COS DENSIFY DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV ELU
EMBEDDING_LOOKUP EQUAL EXP EXPAND_DIMS FILL FLOOR FULLY_CONNECTED GATHER GREATER GREATER_EQUAL
HARD_SWISH HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LEAKY_RELU LESS LESS_EQUAL
LOCAL_RESPONSE_NORMALIZATION LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC LOG_SOFTMAX
LSH_PROJECTION LSTM MAXIMUM MAX_POOL_2D MEAN MINIMUM MUL NEG NOT_EQUAL PACK PAD PADV2 POW PRELU
QUANTIZE REDUCE_ANY REDUCE_MAX REDUCE_MIN REDUCE_PROD RELU RELU6 RELU_N1_TO_1 RESHAPE
RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RNN RSQRT SELECT SIN SLICE SOFTMAX SPACE_TO_BATCH_ND
SPACE_TO_DEPTH SPLIT SPLIT_V SQRT SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TILE
TOPK_V2 TRANSPOSE TRANSPOSE_CONV UNIDIRECTIONAL_SEQUENCE_LSTM UNIDIRECTIONAL_SEQUENCE_RNN UNPACK
"""
TAKEN = {
    "GPU": frozenset(_GPU.split()),
    "Edge TPU": frozenset(_EDGE_TPU.split()),
    "Core ML": frozenset(_CORE_ML.split()),
    "NNAPI": frozenset(_NNAPI.split()),
}
NEEDS = {
    "GPU": "a fixed batch size; casts from uint8 and sums of int32 stay on the CPU",
    "Edge TPU": 'a fixed batch size and `quantization="int8"`; the score stays float, on the CPU',
    "Core ML": "a fixed batch size of 1, no integers, and `coreml_version` 2 for RESHAPE",
    "NNAPI": "a fixed batch size; deprecated from Android 15 on",
}


def refused(operators: Iterable[str]) -> dict[str, list[str]]:
    """Return the operations that each delegate does not support.

    Args:
        operators: Names of operations, as `metadata.operators` returns them.

    Returns:
        Dict from the name of a delegate to a sorted list of names.

    Example:
    >>> refused(["CONV_2D", "GATHER"])["Edge TPU"]
    ['GATHER']
    """
    return {name: sorted(set(operators) - taken) for name, taken in TAKEN.items()}


def report(
    operators: Iterable[str], quantization: str | None = None, batch_size: int | None = None
) -> str:
    """Describe what delegates other than the CPU's would leave to the CPU.

    Args:
        operators: Names of the file's operations.
        quantization: Quantization of the file: see `export.tflite`.
        batch_size: Fixed batch size of the file, or None.

    Returns:
        String of a few lines.
    """
    lines = [
        f"  {name} (needs {NEEDS[name]}) refuses: {', '.join(names) or 'none'}"
        for name, names in refused(operators).items()
    ]
    shape = "any batch size" if batch_size is None else f"batch size {batch_size}"
    head = f"Operations that delegates leave to the CPU ({quantization or 'float32'}, {shape}):"
    return "\n".join([head, *lines])
