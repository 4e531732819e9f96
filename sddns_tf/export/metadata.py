"""Metadata of a `.tflite` file: its operators, its calibration and its description.

The calibration is stored in three buffers of the file. `scores` are the sorted calibration scores,
padded with minus infinity. `p_values` is a table from the number of calibration scores that are at
least as high as a score to its p-value. `rate` is the false positive rate. The description is JSON
in the file's metadata, under the name `sddns_tf`. It names these buffers, so that a device can
recalibrate the file in place without TensorFlow, as `examples/edge_inference.py` does. Free rows
for false alarms are in two more buffers: see `extension`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from sddns_tf.types import Array

NAME = "sddns_tf"
_DESCRIPTION_BYTES = 4096  # Padded: a device may rewrite it in place but cannot make it longer.


def _schema() -> Any:
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


def operators(file: Any) -> list[str]:
    """Return the names of the operators that a file uses, `CUSTOM` for those not built in.

    Args:
        file: Bytes of a `.tflite` file.

    Returns:
        Sorted list of names.
    """
    schema = _schema()
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    model = schema.Model.GetRootAs(file)
    codes = (model.OperatorCodes(i) for i in range(model.OperatorCodesLength()))
    # Codes up to 126 are in a field of one byte; 127 there refers to the other field.
    return sorted({names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes})


def calibration_placeholders(capacity: int) -> dict[str, Any]:
    """Return placeholders for the calibration, whose values serve to find its buffers in the file.

    Args:
        capacity: Largest number of calibration scores that the file can hold.

    Returns:
        Dict of float32 arrays: `"scores"` `(capacity,)`, `"p_values"` `(capacity + 1,)` and
        `"rate"` `()`.
    """
    numbers = np.random.default_rng(0x5DD5).uniform(1e5, 2e5, 2 * capacity + 1).astype(np.float32)
    return {
        "scores": numbers[:capacity],
        "p_values": numbers[capacity:],
        "rate": np.float32(0.27182817),
    }


def described(file: Any, description: Any, placeholders: Any) -> bytearray:
    """Return a file with a description that says where what a device may rewrite is stored.

    Args:
        file: Bytes of a `.tflite` file, converted with the placeholders.
        description: JSON-serializable dict.
        placeholders: Result of `calibration_placeholders`, and of `extension.placeholders` where
            the file has room for more rows.

    Returns:
        Bytearray of the file. Its description has the additional entry `"buffers"`.

    Raises:
        RuntimeError: If a placeholder is not in exactly one buffer.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    schema = _schema()
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(file))
    buffers = {name: _buffer_of(model, name, value) for name, value in placeholders.items()}
    text = json.dumps({**description, "buffers": buffers}).encode()
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(text.ljust(_DESCRIPTION_BYTES), np.uint8)
    entry = schema.MetadataT()
    entry.name, entry.buffer = NAME, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    for subgraph in model.subgraphs:
        # Signatures refer to tensors by number, and the names take 70 kB in a small ViT.
        for tensor in subgraph.tensors:
            tensor.name = b""
    return bytearray(flatbuffer_utils.convert_object_to_bytearray(model))


def _buffer_of(model: Any, name: str, value: np.ndarray) -> int:
    content = value.tobytes()
    found = [
        index
        for index, buffer in enumerate(model.buffers)
        if buffer.data is not None and bytes(buffer.data) == content
    ]
    if len(found) != 1:
        raise RuntimeError(
            f"The placeholder of {name} should be one constant of the converted file. "
            f"Received: {len(found)} constants with that value"
        )
    return found[0]


def description(file: Any) -> dict[str, Any]:
    """Return the description in a file.

    Args:
        file: Bytes of a `.tflite` file.

    Returns:
        Dict.

    Raises:
        ValueError: If the file has none.
    """
    return json.loads(_description_bytes(file).tobytes())


def describe(file: Any, values: Any) -> None:
    """Rewrite some entries of the description in place.

    Args:
        file: Bytearray of a described `.tflite` file.
        values: Dict of the entries to change.
    """
    place = _description_bytes(file)
    text = json.dumps({**description(file), **values}).encode()
    if len(text) > len(place):
        raise ValueError(
            f"The description must fit into {len(place)} bytes. Received: {len(text)} bytes"
        )
    place[:] = np.frombuffer(text.ljust(len(place)), np.uint8)


def values(file: Any, name: str) -> np.ndarray:
    """Return the numbers in one of the buffers that the description names.

    Args:
        file: Bytearray of a described `.tflite` file.
        name: Name of the buffer.

    Returns:
        Float32 array of one dimension. Assigning to it rewrites the file.
    """
    index = description(file)["buffers"][name]
    return _schema().Model.GetRootAs(file).Buffers(index).DataAsNumpy().view(np.float32)


def calibrate(file: Any, scores: Array, rate: float) -> None:
    """Rewrite the calibration in place.

    Args:
        file: Bytearray of a described `.tflite` file.
        scores: The file's scores for calibration images, float32 `(N,)`, with N at most its
            `"calibration_room"`.
        rate: False positive rate, a float.
    """
    place = values(file, "scores")
    # No score is at most minus infinity, so the padding is never counted.
    place[:] = -np.inf
    place[: len(scores)] = np.sort(np.asarray(scores, np.float32))
    table = values(file, "p_values")
    ranks = np.arange(1, len(table) + 1, dtype=np.float32)
    table[:] = np.minimum(ranks / np.float32(1 + len(scores)), 1.0)
    values(file, "rate")[:] = rate
    flagged = np.count_nonzero(
        ranks[: len(scores)] / np.float32(1 + len(scores)) <= np.float32(rate)
    )
    told = {"false_positive_rate": rate, "calibration_images": len(scores)}
    describe(file, {**told, "threshold": float(np.sort(scores)[-flagged]) if flagged else None})


def _description_bytes(file: Any) -> np.ndarray:
    model = _schema().Model.GetRootAs(file)
    for index in range(model.MetadataLength()):
        if model.Metadata(index).Name() == NAME.encode():
            return model.Buffers(model.Metadata(index).Buffer()).DataAsNumpy()
    raise ValueError(
        "`file` must be a .tflite file that `sddns_tf.export.tflite` wrote. "
        "Received: a file without a description of a detector"
    )
