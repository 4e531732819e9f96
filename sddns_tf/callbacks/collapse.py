"""`CollapseMonitor`: says when a training has collapsed, and how."""

import keras
import numpy as np
from absl import logging

from sddns_tf.callbacks import training_state
from sddns_tf.validation import check_bool, check_int, check_number

_WATCHED = ("loss", "teacher_entropy", "mean_output_entropy")
_ADVICE = {
    "uniform": (
        "the teacher gives all prototypes the same probability. Try a lower "
        "`teacher_temperature`, a `negative_weight` that ramps up later, or a lower learning rate"
    ),
    "one prototype": (
        "the teacher gives all images the same prototype. Try a higher `teacher_temperature`, a "
        "lower `center_momentum`, or a lower learning rate"
    ),
    "not finite": "the loss is not a finite number. Try a lower learning rate, or float32",
}


@keras.saving.register_keras_serializable("sddns_tf")
class CollapseMonitor(keras.callbacks.Callback):
    """Says when self-distillation has collapsed, in which direction, and what to try.

    Two collapses are known. *Uniform*: the teacher gives every prototype the same probability, its
    entropy stays near ln K. *One prototype*: it gives all probability to one prototype whatever
    the image, the entropy of its mean output is near 0. The centre works against the second and
    for the first, the teacher temperature the other way round. A loss that is not finite is
    reported as well.

    Looks at means over windows of `window` steps, or over an epoch where that is shorter. The
    first collapse is reported, once.

    Args:
        window: Steps of a window.
        patience: Windows in a row that must look collapsed.
        uniform_above: `teacher_entropy`, relative to ln K, above which outputs count as uniform.
        one_prototype_below: `mean_output_entropy`, likewise, below which all images have one
            prototype.
        stop_training: Whether to end the training.

    Example:
        >>> model.fit(batches, callbacks=[CollapseMonitor(stop_training=True)])

    Reference:
        Caron et al., arXiv 2104.14294, section 5.3, "Avoiding collapse".
    """

    def __init__(
        self,
        window=20,
        patience=5,
        uniform_above=0.995,
        one_prototype_below=0.02,
        stop_training=False,
    ):
        super().__init__()
        check_int("window", window)
        check_int("patience", patience)
        check_number("uniform_above", uniform_above, 0.0, 1.0)
        check_number("one_prototype_below", one_prototype_below, 0.0, 1.0)
        check_bool("stop_training", stop_training)
        self.window = window
        self.patience = patience
        self.uniform_above = uniform_above
        self.one_prototype_below = one_prototype_below
        self.stop_training = stop_training
        self.collapse = None

    def on_train_begin(self, logs=None):
        """Forget what an earlier run looked like."""
        del logs
        self.collapse = None
        self._suspect, self._windows = None, 0

    def on_epoch_begin(self, epoch, logs=None):
        """Keras' running means start anew with each epoch."""
        del epoch, logs
        self._start, self._seen, self._sums = 0, 0, np.zeros(len(_WATCHED))

    def on_train_batch_end(self, batch, logs=None):
        """At the end of each window, look at its means."""
        self._seen = batch + 1
        if self._seen - self._start >= self.window:
            self._look(logs)

    def on_epoch_end(self, epoch, logs=None):
        """An epoch shorter than a window is one."""
        del epoch
        if self._start == 0 and self._seen:
            self._look(logs)

    def _look(self, logs):
        if self.collapse:
            return
        sums = self._seen * np.array([float(logs[name]) for name in _WATCHED])
        means = dict(zip(_WATCHED, (sums - self._sums) / (self._seen - self._start), strict=True))
        self._start, self._sums = self._seen, sums
        suspect = self._diagnose(**means)
        self._windows = self._windows + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        if suspect and self._windows >= self.patience:
            self._report(suspect, means)

    def _diagnose(self, loss, teacher_entropy, mean_output_entropy):
        if not np.isfinite([loss, teacher_entropy, mean_output_entropy]).all():
            return "not finite"
        if teacher_entropy > self.uniform_above:
            return "uniform"
        if mean_output_entropy < self.one_prototype_below:
            return "one prototype"
        return None

    def _report(self, collapse, means):
        self.collapse = collapse
        seen = ", ".join(f"{name}={value:.4f}" for name, value in means.items())
        logging.warning(
            f"Collapse ({collapse}) at step {training_state.step_of(self.model)}: "
            f"{_ADVICE[collapse]}. In the last {self.window} steps: {seen}."
        )
        if self.stop_training:
            self.model.stop_training = True

    def get_config(self):
        """Constructor arguments."""
        return {
            "window": self.window,
            "patience": self.patience,
            "uniform_above": self.uniform_above,
            "one_prototype_below": self.one_prototype_below,
            "stop_training": self.stop_training,
        }

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` describes."""
        return cls(**config)
