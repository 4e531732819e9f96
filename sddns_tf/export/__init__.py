"""Detectors for where there is no Keras: a SavedModel for TensorFlow Serving, a `.tflite` file.

Either carries everything: resizing, normalization, backbone, bank, score and calibration.
"""

from sddns_tf.export import metadata
from sddns_tf.export.to_saved_model import saved_model
from sddns_tf.export.to_tflite import tflite

__all__ = ["metadata", "saved_model", "tflite"]
