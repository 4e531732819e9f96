"""`CollapseMonitor`: reports when training has collapsed, and how."""

from __future__ import annotations

from typing import Any, Self

import keras
import numpy as np
from absl import logging

from sddns_tf.callbacks import training_state
from sddns_tf.types import Array
from sddns_tf.validation import check_bool, check_int, check_number

_WATCHED = (
    "loss",
    "positive_loss",
    "negative_loss",
    "teacher_entropy",
    "mean_output_entropy",
    "feature_std",
    "teacher_spread",
)
_ADVICE = {
    "not started": (
        "the student predicts other views no better than a uniform output does. Wait, or try a "
        "higher learning rate"
    ),
    "constant features": (
        "all images look alike to the teacher, and the center cancels what they have in common. "
        "Leave `teacher_temperature` at None, which standardizes features, or try a lower one; "
        "or try a lower learning rate or a warm-up"
    ),
    "uniform by negatives": (
        "the student gives all prototypes the same probability, for negatives (as intended) but "
        "also for the images. Leave it to the model when negatives count (None), or try a lower "
        "`negative_weight` or negatives that look less like the images"
    ),
    "one prototype": (
        "the teacher gives all images the same prototype. Leave `teacher_temperature` at None, "
        "which balances prototypes, or try a higher one; or try a lower `center_momentum` or "
        "learning rate"
    ),
    "not finite": "the loss is not a finite number. Try a lower learning rate, or float32",
}


@keras.saving.register_keras_serializable("sddns_tf")
class CollapseMonitor(keras.callbacks.Callback):
    """Reports when self-distillation has collapsed, in which way, and what to try.

    It distinguishes these states, with K prototypes:

    - *not finite*: the loss is not a finite number.
    - *one prototype*: the teacher gives all probability to the same prototype for every image; the
      entropy of its mean output is near 0.
    - *constant features*: the teacher's outputs are uniform, with entropy ln K, because images
      look alike and the center cancels what they have in common. Either the spread of the features
      has shrunk, or the negatives cannot be the cause: there are none, or the student's outputs
      for them are not uniform.
    - *uniform by negatives*: the student's outputs are uniform, so the positive loss is ln K, and
      the negative loss is at its floor, also ln K.
    - *not started*: the teacher tells images apart but the student does not follow: the positive
      loss is ln K or more. This is reported but is not a collapse.

    It looks at means over windows of `window` steps, or over an epoch if that is shorter. The
    first collapse is reported once, and so is a training that does not start.

    Args:
        window: Steps per window.
        patience: Number of windows in a row that must look collapsed.
        uniform_above: `teacher_entropy` or `positive_loss`, relative to ln K, above which outputs
            count as uniform.
        one_prototype_below: `mean_output_entropy`, relative to ln K, below which all images count
            as having the same prototype.
        constant_below: `feature_std`, relative to its largest window, below which features count
            as constant.
        stop_training: Whether to stop training at a collapse.

    Attributes:
        state: What the last windows looked like, one of the above; None if the model is learning.
        collapse: The collapse that was reported, or None.

    Example:
        >>> model.fit(batches, callbacks=[CollapseMonitor(stop_training=True)])

    Reference:
        Caron et al., arXiv 2104.14294, section 5.3, "Avoiding collapse".
    """

    def __init__(
        self,
        window: int = 20,
        patience: int = 5,
        uniform_above: float = 0.995,
        one_prototype_below: float = 0.02,
        constant_below: float = 0.5,
        stop_training: bool = False,
    ) -> None:
        super().__init__()
        check_int("window", window)
        check_int("patience", patience)
        check_number("uniform_above", uniform_above, 0.0, 1.0)
        check_number("one_prototype_below", one_prototype_below, 0.0, 1.0)
        check_number("constant_below", constant_below, 0.0, 1.0)
        check_bool("stop_training", stop_training)
        self.window = window
        self.patience = patience
        self.uniform_above = uniform_above
        self.one_prototype_below = one_prototype_below
        self.constant_below = constant_below
        self.stop_training = stop_training
        self.state = self.collapse = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Forget the state of an earlier run."""
        del logs
        self.state = self.collapse = None
        self._windows, self._widest, self._step = 0, 0.0, -1
        self._reported: set[str] = set()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start new sums, because Keras resets its running means in each epoch."""
        del epoch, logs
        self._seen = 0
        self._begin_windows(0)

    def _begin_windows(self, batch):
        """Start new sums at a batch, from which on Keras' running means are taken."""
        self._first, self._start, self._sums = batch, 0, np.zeros(len(_WATCHED))

    def on_train_batch_end(self, batch: Array, logs: Any = None) -> None:
        """At the end of each window, look at its means."""
        step = training_state.step_of(self.model)
        if step < self._step:  # `NotFinite` has rolled back, and Keras' means began again.
            self._begin_windows(batch + 1)
        self._step = step
        self._seen = batch + 1 - self._first
        if self._seen - self._start >= self.window:
            self._look(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Treat an epoch shorter than a window as one."""
        del epoch
        if self._start == 0 and self._seen:
            self._look(logs)

    def _look(self, logs):
        if self.collapse:
            return
        sums = self._seen * np.array([float(logs[name]) for name in _WATCHED])
        means = dict(zip(_WATCHED, (sums - self._sums) / (self._seen - self._start), strict=True))
        self._start, self._sums = self._seen, sums
        self._widest = max(self._widest, means["feature_std"])
        state = self._diagnose(means)
        self._windows = self._windows + 1 if state == self.state else 1
        self.state = state
        if state and self._windows >= self.patience and state not in self._reported:
            self._report(means)

    def _diagnose(self, means):
        if not np.isfinite(list(means.values())).all():
            return "not finite"
        if means["mean_output_entropy"] < self.one_prototype_below:
            return "one prototype"
        uniform_loss = np.log(self.model.center.shape[0])
        teacher_is_uniform = means["teacher_entropy"] > self.uniform_above
        student_is_uniform = means["positive_loss"] > self.uniform_above * uniform_loss
        if not (teacher_is_uniform or student_is_uniform):
            return None
        features_shrank = means["feature_std"] < self.constant_below * self._widest
        if teacher_is_uniform and features_shrank:
            return "constant features"
        # Without negatives this loss is 0.
        if uniform_loss * 0.99 < means["negative_loss"] < uniform_loss * (2 - self.uniform_above):
            return "uniform by negatives"
        return "constant features" if teacher_is_uniform else "not started"

    def _report(self, means):
        self._reported.add(self.state)
        what = "Not started" if self.state == "not started" else f"Collapse ({self.state})"
        seen = ", ".join(f"{name}={value:.4f}" for name, value in means.items())
        logging.warning(
            f"{what} at step {training_state.step_of(self.model)}: {_ADVICE[self.state]}. "
            f"In the last steps: {seen}."
        )
        if self.state == "not started":
            return
        self.collapse = self.state
        if self.stop_training:
            self.model.stop_training = True

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "window": self.window,
            "patience": self.patience,
            "uniform_above": self.uniform_above,
            "one_prototype_below": self.one_prototype_below,
            "constant_below": self.constant_below,
            "stop_training": self.stop_training,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the callback that `get_config` describes."""
        return cls(**config)
