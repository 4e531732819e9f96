"""Self-supervised anomaly detection by self-distillation and negative sampling, for Keras 3.

Train `SelfDistillation` on unlabeled normal images with `fit`, make a `Detector` from its teacher
backbone, and export that for TensorFlow Serving or TFLite.
"""

import importlib
import sys

from sddns_tf import _registration
from sddns_tf.version import __version__ as __version__

# Where each public name lives. A name is imported on first use, so that what needs no TensorFlow,
# such as `sddns score parts.tflite`, does not wait for it.
_MODULES = (
    "backbones",
    "bank",
    "callbacks",
    "data",
    "dino_weights",
    "evaluation",
    "export",
    "features",
    "image_ops",
    "losses",
    "metrics",
    "plots",
    "report",
    "schedules",
    "sensitivity",
    "shifts",
)
_NAMES = {
    "ConvNet": "convnet",
    "Detector": "detector",
    "FeatureExtractor": "features",
    "MultiCrop": "views",
    "Negatives": "views",
    "ProjectionHead": "heads",
    "SelfDistillation": "self_distillation",
    "VisionTransformer": "vit",
    "board": "callbacks.pictures",
    "checkpoint": "callbacks.training_state",
    "edge_metadata": "export.metadata",
    "pretrained": "detector",
    "vit_base": "vit",
    "vit_small": "vit",
    "vit_tiny": "vit",
}
# Modules that moved. Their old names, which were documented, still work.
_MOVED = ("board", "checkpoint", "edge_metadata")

__all__ = sorted({"__version__", *_MODULES, *_NAMES} - set(_MOVED))


def __getattr__(name):
    if name not in _MODULES and name not in _NAMES:
        raise AttributeError(f"module 'sddns_tf' has no attribute {name!r}")
    module = importlib.import_module(f"sddns_tf.{_NAMES.get(name, name)}")
    _registration.complete()
    if name in _MODULES:
        return module
    return module if name in _MOVED else getattr(module, name)


def __dir__():
    return __all__


_registration.when_keras_is_imported(sys.modules)
