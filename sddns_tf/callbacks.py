"""Callbacks that watch the training and keep it: collapse, separation, checkpoints, NaN."""

import shutil
import signal
import sys
import threading

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from sddns_tf import bank, checkpoint, metrics, shifts

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
        "the student says nothing of other views that a uniform output does not. Wait, or try a "
        "higher learning rate"
    ),
    "constant features": (
        "all images look alike to the teacher, and what they have in common says nothing: the "
        "center cancels it. Leave `teacher_temperature` at None, which standardizes features, or "
        "try a lower one; a lower learning rate or a warm-up"
    ),
    "uniform by negatives": (
        "the student gives all prototypes the same probability, for negatives as asked, and for "
        "the images too. Try a lower `negative_weight` or one that ramps up later, or negatives "
        "that look less like the images"
    ),
    "one prototype": (
        "the teacher gives all images the same prototype. Leave `teacher_temperature` at None, "
        "which balances prototypes, or try a higher one; a lower `center_momentum` or learning rate"
    ),
    "not finite": "the loss is not a finite number. Try a lower learning rate, or float32",
}


@keras.saving.register_keras_serializable("sddns_tf")
class CollapseMonitor(keras.callbacks.Callback):
    """Says when self-distillation has collapsed, in which direction, and what to try.

    Told apart are, with K prototypes:

    - *not finite*: the loss is not a number.
    - *one prototype*: the teacher gives all probability to one prototype whatever the image; the
      entropy of its mean output is near 0.
    - *constant features*: the teacher's outputs are uniform, their entropy ln K, since images
      look alike and the center cancels what they have in common. The features' spread has shrunk
      to a part of what it was, or nothing else can have done it: there are no negatives, or the
      student has an opinion on them left.
    - *uniform by negatives*: the student's outputs are uniform, which makes the positive loss
      ln K, and the negatives' loss is at its floor, ln K, as well.
    - *not started*: the teacher tells images apart, and the student does not follow: a positive
      loss of ln K or more. That one is reported and is no collapse.

    Looks at means over windows of `window` steps, or over an epoch where that is shorter. The
    first collapse is reported, once, and so is a start that does not come.

    Args:
        window: Steps of a window.
        patience: Windows in a row that must look collapsed.
        uniform_above: `teacher_entropy` or `positive_loss`, relative to ln K, above which outputs
            count as uniform.
        one_prototype_below: `mean_output_entropy`, likewise, below which all images have one
            prototype.
        constant_below: `feature_std`, relative to its largest window, below which features count
            as constant.
        stop_training: Whether to end the training at a collapse.

    Attributes:
        state: What the last windows looked like, one of the above; None where the model learns.
        collapse: The collapse that was reported, or None.

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
        constant_below=0.5,
        stop_training=False,
    ):
        super().__init__()
        self.window = window
        self.patience = patience
        self.uniform_above = uniform_above
        self.one_prototype_below = one_prototype_below
        self.constant_below = constant_below
        self.stop_training = stop_training
        self.state = self.collapse = None

    def on_train_begin(self, logs=None):
        """Forget what an earlier run looked like."""
        del logs
        self.state = self.collapse = None
        self._windows, self._reported, self._widest = 0, set(), 0.0

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
        # No negatives have a loss of 0.
        if uniform_loss * 0.99 < means["negative_loss"] < uniform_loss * (2 - self.uniform_above):
            return "uniform by negatives"
        return "constant features" if teacher_is_uniform else "not started"

    def _report(self, means):
        self._reported.add(self.state)
        what = "Not started" if self.state == "not started" else f"Collapse ({self.state})"
        seen = ", ".join(f"{name}={value:.4f}" for name, value in means.items())
        logging.warning(
            f"{what} at step {int(self.model.step)}: {_ADVICE[self.state]}. In the last "
            f"{self.window} steps: {seen}."
        )
        if self.state == "not started":
            return
        self.collapse = self.state
        if self.stop_training:
            self.model.stop_training = True

    def get_config(self):
        """Constructor arguments."""
        return {
            "window": self.window,
            "patience": self.patience,
            "uniform_above": self.uniform_above,
            "one_prototype_below": self.one_prototype_below,
            "constant_below": self.constant_below,
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


@keras.saving.register_keras_serializable("sddns_tf")
class Checkpoint(keras.callbacks.Callback):
    """Keeps the training state on disk, so that a killed run goes on as if it had not been.

    A state is written before the first step (a folder that cannot be written to, or a disk with
    too little room, is found then), every so many steps, and at the end. On SIGTERM, as before a
    machine is taken away, the state is written after the current step and the process exits
    with 0. Of several machines the first one writes; all must see the same folder.

    Args:
        folder: Path; made if need be.
        every: Steps between two writes.
        keep: How many states to keep, the newest ones.

    Raises:
        OSError: In `fit`, if the state cannot be written; the message names the folder.

    Example:
        >>> checkpoint = Checkpoint("run/checkpoint", every=500)
        >>> step = checkpoint.restore(model)  # 0 at the first start
        >>> batches = data.load(images, batch_size=64, shuffle=True, first_batch=step)
        >>> model.fit(batches, steps_per_epoch=500, epochs=100, callbacks=[checkpoint])

    See `checkpoint.parts_left` on going on in the middle of an epoch.
    """

    def __init__(self, folder, every=500, keep=2):
        super().__init__()
        if every < 1 or keep < 1:
            raise ValueError(f"`every` and `keep` must be positive. Received: {every}, {keep}")
        self.folder = str(folder)
        self.every = every
        self.keep = keep
        self._terminated = False

    def restore(self, model):
        """Put the newest state into a compiled model.

        Args:
            model: `SelfDistillation`, built and compiled as the one that was saved.

        Returns:
            Int; the steps it has done, 0 where nothing was saved.
        """
        checkpoint.restore(model, self.folder)
        return int(model.step)

    def last(self):
        """Path of the newest state, or `None`."""
        return next(reversed(checkpoint.saved(self.folder)), None)

    def on_train_begin(self, logs=None):
        """Write a first state, and listen for SIGTERM."""
        del logs
        self._since = 0
        self.save()
        self._check_room()
        self._terminated = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_batch_begin(self, batch, logs=None):
        """Remember where a call of the step, which may be several steps, begins."""
        del logs
        self._begin = batch

    def on_train_batch_end(self, batch, logs=None):
        """Write where it is time to."""
        del logs
        self._since += batch - self._begin + 1
        if self._since >= self.every or self._terminated:
            self.save()
        self._exit_if_terminated()

    def on_epoch_end(self, epoch, logs=None):
        """A signal may have come during the other callbacks."""
        del epoch, logs
        if self._terminated:
            self.save()
        self._exit_if_terminated()

    def on_train_end(self, logs=None):
        """Write the last state, and give SIGTERM back."""
        del logs
        self.save()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
        self._exit_if_terminated()

    def save(self):
        """Write the state now."""
        self._since = 0
        if _writes_here(self.model.distribute_strategy):
            checkpoint.save(self.model, self.folder, self.keep)

    def _check_room(self):
        if not _writes_here(self.model.distribute_strategy):
            return
        needed = self.keep * self.last().stat().st_size
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} needs room for {self.keep + 1} training states, another "
                f"{needed / 2**20:.0f} MB. Received: {free / 2**20:.0f} MB free"
            )

    def _on_sigterm(self, number, frame):
        del number, frame
        if self._terminated:  # asked twice, or `fit` is over with an error
            sys.exit(1)
        self._terminated = True

    def _exit_if_terminated(self):
        if self._terminated:
            logging.warning("SIGTERM: step %d is saved in %s", int(self.model.step), self.folder)
            sys.exit(0)

    def get_config(self):
        """Constructor arguments."""
        return {"folder": self.folder, "every": self.every, "keep": self.keep}

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` describes."""
        return cls(**config)


def _writes_here(strategy):
    resolver = getattr(strategy, "cluster_resolver", None)
    return not (resolver and resolver.task_id)


@keras.saving.register_keras_serializable("sddns_tf")
class NotFinite(keras.callbacks.Callback):
    """Stops the training at the step at which a loss or a weight stops being a finite number.

    Put it before `Checkpoint` in the list of callbacks, so that what is kept is finite. It reads
    the losses and all weights after each step.

    Args:
        checkpoint: The run's `Checkpoint`, or `None`.
        rollbacks: How often to go back to the last state of `checkpoint` and on at half the
            learning rate, before the training is stopped after all. The schedules go back as well;
            the images do not, and the run has as many steps fewer.

    Raises:
        RuntimeError: In `fit`; the message tells step, learning rate, the first tensor that is
            not finite, and the last good state.

    Example:
        >>> kept = Checkpoint("run/checkpoint")
        >>> model.fit(batches, callbacks=[NotFinite(kept, rollbacks=3), kept])
    """

    def __init__(self, checkpoint=None, rollbacks=0):
        super().__init__()
        if rollbacks and checkpoint is None:
            raise ValueError(
                f"Rolling back needs `checkpoint`. Received: checkpoint=None, rollbacks={rollbacks}"
            )
        self.checkpoint = checkpoint
        self.rollbacks = rollbacks

    def on_train_begin(self, logs=None):
        """Compile the look at the weights."""
        del logs
        self._rolled_back = 0
        self._watched = [v for v in self.model.weights if keras.backend.is_float_dtype(v.dtype)]
        self._are_finite = tf.function(self._look)

    def on_train_batch_end(self, batch, logs=None):
        """Look; go back or stop."""
        del batch
        found = [f"{name} (logged)" for name in ("positive_loss", "negative_loss", "loss")
                 if not np.isfinite(float(logs[name]))]  # fmt: skip
        finite = self._are_finite().numpy()
        found += [v.path for v, good in zip(self._watched, finite, strict=True) if not good]
        if not found:
            return
        last = self.checkpoint and self.checkpoint.last()
        message = (
            f"Not finite at step {int(self.model.step)}, learning rate "
            f"{float(logs['learning_rate']):.3g}: first {found[0]}; {(~finite).sum()} of "
            f"{len(finite)} weights. Last good state: {last or 'none was kept'}."
        )
        if self._rolled_back >= self.rollbacks:
            raise RuntimeError(f"{message} Try a lower learning rate, or float32.")
        self._rolled_back += 1
        step = self.checkpoint.restore(self.model)
        checkpoint.scale_learning_rate(self.model, 0.5)
        self.checkpoint.save()
        self.model.reset_metrics()
        logging.warning("%s Going on from step %d at half the learning rate.", message, step)

    def _look(self):
        return tf.stack([tf.reduce_all(tf.math.is_finite(v)) for v in self._watched])

    def get_config(self):
        """Constructor arguments."""
        serialize = keras.saving.serialize_keras_object
        return {"checkpoint": serialize(self.checkpoint), "rollbacks": self.rollbacks}

    @classmethod
    def from_config(cls, config):
        """The callback that `get_config` describes."""
        return cls(keras.saving.deserialize_keras_object(config["checkpoint"]), config["rollbacks"])
