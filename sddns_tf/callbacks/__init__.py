"""Callbacks that monitor and save the training: collapse, separation, checkpoints, pictures."""

from sddns_tf.callbacks import training_state
from sddns_tf.callbacks.checkpoint import Checkpoint
from sddns_tf.callbacks.collapse import CollapseMonitor
from sddns_tf.callbacks.not_finite import NotFinite
from sddns_tf.callbacks.pictures import TrainingPictures
from sddns_tf.callbacks.probe import OODProbe

__all__ = [
    "Checkpoint",
    "CollapseMonitor",
    "NotFinite",
    "OODProbe",
    "TrainingPictures",
    "training_state",
]
