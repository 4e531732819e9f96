"""Detectors for where there is no Keras: a SavedModel for TensorFlow Serving, a `.tflite` file.

Either carries everything: resizing, normalization, backbone, bank, score and calibration.
"""

from sddns_tf.edge import tflite
from sddns_tf.serving import saved_model

__all__ = ["saved_model", "tflite"]
