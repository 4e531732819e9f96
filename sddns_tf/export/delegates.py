"""Which operations of a `.tflite` file an accelerator would leave to the CPU.

Without these lists you would only find out on the device: a delegate runs the operations it
supports, and each switch between it and the CPU costs time. The lists compare names only; further
requirements are in `NEEDS`. What a delegate really takes also depends on versions, shapes and
drivers. The lists for GPU and Core ML follow the vendors' pages. Those for Edge TPU and NNAPI were
written from memory and have not been compared with the pages named beside them: take them as a
hint, and try the file on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

# https://ai.google.dev/edge/litert/performance/gpu, "GPU ML operations support". DEQUANTIZE and
# QUANTIZE are added here; that page does not name them.
_GPU = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D EXP FULLY_CONNECTED LOGICAL_AND LOGISTIC
LSTM MAX_POOL_2D MAXIMUM MINIMUM MUL PAD PRELU RELU RELU6 RESHAPE RESIZE_BILINEAR SOFTMAX
STRIDED_SLICE SUB TRANSPOSE_CONV DEQUANTIZE QUANTIZE
"""
# Not yet compared with https://coral.ai/docs/edgetpu/models-intro/#supported-operations
_EDGE_TPU = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D EXPAND_DIMS FULLY_CONNECTED
L2_NORMALIZATION LOGISTIC LSTM MAXIMUM MAX_POOL_2D MEAN MINIMUM MUL PACK PAD PRELU QUANTIZE
REDUCE_MAX REDUCE_MIN RELU RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR RSQRT
SLICE SOFTMAX SPACE_TO_DEPTH SPLIT SQUARED_DIFFERENCE SQUEEZE STRIDED_SLICE SUB SUM TANH TRANSPOSE
TRANSPOSE_CONV
"""
# https://github.com/tensorflow/tensorflow: tensorflow/lite/g3doc/performance/coreml_delegate.md
_CORE_ML = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED HARD_SWISH LOGISTIC
MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR SOFTMAX TANH TRANSPOSE_CONV
"""
# Operations of API level 30, not yet compared with their list:
# https://developer.android.com/ndk/reference/group/neural-networks
_NNAPI = """
ABS ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_TO_SPACE_ND CAST CONCATENATION CONV_2D DEPTH_TO_SPACE
DEPTHWISE_CONV_2D DEQUANTIZE DIV ELU EMBEDDING_LOOKUP EQUAL EXP EXPAND_DIMS FILL FLOOR
FULLY_CONNECTED GATHER GREATER GREATER_EQUAL HARD_SWISH HASHTABLE_LOOKUP L2_NORMALIZATION
L2_POOL_2D LESS LESS_EQUAL LOCAL_RESPONSE_NORMALIZATION LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR
LOGISTIC LSTM MAXIMUM MAX_POOL_2D MEAN MINIMUM MUL NEG NOT_EQUAL PAD PADV2 POW PRELU QUANTIZE RANK
REDUCE_ANY REDUCE_MAX REDUCE_MIN REDUCE_PROD RELU RELU6 RELU_N1_TO_1 RESHAPE RESIZE_BILINEAR
RESIZE_NEAREST_NEIGHBOR RNN RSQRT SELECT SIN SLICE SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH SPLIT
SQRT SQUEEZE STRIDED_SLICE SUB SUM SVDF TANH TILE TOPK_V2 TRANSPOSE TRANSPOSE_CONV
"""
TAKEN = {
    "GPU": frozenset(_GPU.split()),
    "Edge TPU": frozenset(_EDGE_TPU.split()),
    "Core ML": frozenset(_CORE_ML.split()),
    "NNAPI": frozenset(_NNAPI.split()),
}
NEEDS = {
    "GPU": "a fixed batch size",
    "Edge TPU": 'a fixed batch size and `quantization="int8"`; the score stays float, on the CPU',
    "Core ML": "a fixed batch size of 1, and no integers",
    "NNAPI": "a fixed batch size; deprecated from Android 15 on",
}


def refused(operators: Iterable[str]) -> dict[str, list[str]]:
    """Return the operations that each delegate does not support.

    Args:
        operators: Names of operations, as `metadata.operators` returns them.

    Returns:
        Dict from the name of a delegate to a sorted list of names.

    Example:
    >>> refused(["CONV_2D", "GATHER"])["GPU"]
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
