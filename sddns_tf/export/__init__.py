"""Export detectors to run without Keras: a SavedModel for TensorFlow Serving, or a `.tflite` file.

Each contains everything: resizing, normalization, backbone, bank, score and calibration.
"""

from __future__ import annotations

import importlib
from typing import Any

# Imported on first use: a program that reads a `.tflite` file needs `metadata` but no TensorFlow.
_MODULES = {"saved_model": "to_saved_model", "tflite": "to_tflite"}

__all__ = ["metadata", "saved_model", "tflite"]


def __getattr__(name: str) -> Any:
    if name == "metadata":
        return importlib.import_module("sddns_tf.export.metadata")
    if name not in _MODULES:
        raise AttributeError(f"module 'sddns_tf.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sddns_tf.export.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
