"""Self-supervised anomaly detection by self-distillation and negative sampling, for Keras 3.

Train `SelfDistillation` on unlabelled normal images with `fit`, make a `Detector` of its teacher
backbone, and export that for TensorFlow Serving or TFLite.
"""

import os

_WRONG_BACKEND = (
    "sddns_tf needs Keras' TensorFlow backend: set the environment variable "
    'KERAS_BACKEND="tensorflow" before importing keras. Received: KERAS_BACKEND="{}"'
)

try:
    import keras
except ImportError as error:
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend == "tensorflow":
        raise
    raise ImportError(_WRONG_BACKEND.format(backend)) from error

if keras.backend.backend() != "tensorflow":
    raise ImportError(_WRONG_BACKEND.format(keras.backend.backend()))

from sddns_tf import (
    bank,
    board,
    callbacks,
    checkpoint,
    data,
    dino_weights,
    evaluation,
    export,
    image_ops,
    losses,
    metrics,
    plots,
    report,
    schedules,
    sensitivity,
    shifts,
)
from sddns_tf.detector import Detector
from sddns_tf.heads import ProjectionHead
from sddns_tf.pretrained_models import pretrained
from sddns_tf.self_distillation import SelfDistillation
from sddns_tf.version import __version__
from sddns_tf.views import MultiCrop, Negatives
from sddns_tf.vit import VisionTransformer, vit_base, vit_small, vit_tiny

__all__ = [
    "Detector",
    "MultiCrop",
    "Negatives",
    "ProjectionHead",
    "SelfDistillation",
    "VisionTransformer",
    "__version__",
    "bank",
    "board",
    "callbacks",
    "checkpoint",
    "data",
    "dino_weights",
    "evaluation",
    "export",
    "image_ops",
    "losses",
    "metrics",
    "plots",
    "pretrained",
    "report",
    "schedules",
    "sensitivity",
    "shifts",
    "vit_base",
    "vit_small",
    "vit_tiny",
]
