"""Requests with which TensorFlow Serving warms up a model before clients may use it.

The first request to a signature is slow, because memory is allocated and kernels are chosen. So a
server first runs the records in `assets.extra/tf_serving_warmup_requests`. Each record is a
`PredictionLog` of TensorFlow Serving's API. Only a few of its fields are needed. They are written
here in the wire format of protocol buffers, so that exports do not depend on that library; tests
compare the result with it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import tensorflow as tf

from sddns_tf.types import Array

FILE = "tf_serving_warmup_requests"

# Numbers of the fields in prediction_log.proto, predict.proto and model.proto.
_LOG_PREDICT, _PREDICT_REQUEST = 6, 1
_REQUEST_MODEL, _REQUEST_INPUTS = 1, 2
_MODEL_NAME, _MODEL_SIGNATURE = 1, 3
_MAP_KEY, _MAP_VALUE = 1, 2


def write(
    folder: pathlib.Path, model: str, requests: Iterable[tuple[str, dict[str, Array]]]
) -> None:
    """Write warm-up requests in the given order.

    Args:
        folder: Existing folder, `assets.extra` of a SavedModel.
        model: Name under which the model is served.
        requests: Pairs of a signature's name and its inputs, a dict of arrays.
    """
    with tf.io.TFRecordWriter(str(folder / FILE)) as writer:
        for signature, inputs in requests:
            request = _predict_request(model, signature, inputs)
            writer.write(_field(_LOG_PREDICT, _field(_PREDICT_REQUEST, request)))


def _predict_request(model: str, signature: str, inputs: dict[str, Array]) -> bytes:
    spec = _field(_MODEL_NAME, model.encode()) + _field(_MODEL_SIGNATURE, signature.encode())
    request = _field(_REQUEST_MODEL, spec)
    for name, array in inputs.items():
        tensor = tf.make_tensor_proto(array).SerializeToString()
        entry = _field(_MAP_KEY, name.encode()) + _field(_MAP_VALUE, tensor)
        request += _field(_REQUEST_INPUTS, entry)
    return request


def _field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes: its number and wire type, the length, the bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encode an int in bytes of seven bits, lowest first; the high bit says that more follow."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
