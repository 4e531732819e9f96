"""Callbacks that watch the training: collapse, and how well the score separates."""

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from sddns_tf import bank, metrics, shifts

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
            f"Collapse ({collapse}) at step {int(self.model.step)}: {_ADVICE[collapse]}. In the "
            f"last {self.window} steps: {seen}."
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


@keras.saving.register_keras_serializable("sddns_tf")
class OODProbe(keras.callbacks.Callback):
    """Measures, every few epochs, how well the teacher's score separates what it should.

    Held-out in-distribution images are scored against the same images put through each shift
    (this needs no OOD data) and against any OOD sets given. The AUROCs go into the logs as
    `auroc_<name>`, so that `History`, `CSVLogger` and `TensorBoard` record them; put the probe
    before those in the list of callbacks.

    Args:
        bank: In-distribution training images `(M, H, W, 3)`, uint8 or float in 0-255; a few
            thousand do.
        held_out: In-distribution images that are not trained on, `(N, H, W, 3)`.
        shifts: Names from `shifts.NAMES`, or callables.
        ood: Dictionary of names and OOD images `(N', H', W', 3)`.
        every: Epochs between two measurements; the first epoch is measured.
        batch_size: Images per forward.

    Example:
        >>> probe = OODProbe(train[:2000], held_out, shifts=("rot90", "perm4"), every=5)
        >>> history = model.fit(batches, epochs=50, callbacks=[probe])
        >>> history.history["auroc_rot90"]
    """

    def __init__(
        self, bank, held_out, shifts=("rot90", "perm4"), ood=None, every=1, batch_size=256
    ):
        super().__init__()
        self.bank = np.asarray(bank)
        self.held_out = np.asarray(held_out)
        self.shifts = tuple(shifts)
        self.ood = dict(ood or {})
        self.every = every
        self.batch_size = batch_size

    def on_train_begin(self, logs=None):
        """Shift the held-out images once, so that every epoch is measured on the same ones."""
        del logs
        self._sets = dict(self.ood)
        for index, shift in enumerate(self.shifts):
            name = shifts.name_of(shift)
            shifted = shifts.get(shift)(tf.convert_to_tensor(self.held_out), [index, 0])
            self._sets[name] = shifted.numpy()
        self._extractor = bank.FeatureExtractor(
            self.model.teacher_backbone,
            image_size=self.model.views.image_size,
            resolution=self.bank.shape[1:3],
            mean=self.model.mean,
            std=self.model.std,
        )

    def on_epoch_end(self, epoch, logs=None):
        """Measure, and write into the logs."""
        if epoch % self.every:
            return
        features = self._features(self.bank)
        scores = bank.ood_score(self._features(self.held_out), features).numpy()
        for name, images in self._sets.items():
            ood_scores = bank.ood_score(self._features(images), features).numpy()
            logs[f"auroc_{name}"] = metrics.ood_metrics(scores, ood_scores)["auroc"]

    def _features(self, images):
        return bank.extract_features(self._extractor, images, batch_size=self.batch_size, verbose=0)

    def get_config(self):
        """Constructor arguments."""
        return {
            "bank": self.bank,
            "held_out": self.held_out,
            "shifts": self.shifts,
            "ood": self.ood,
            "every": self.every,
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` describes."""
        return cls(**keras.saving.deserialize_keras_object(config))
