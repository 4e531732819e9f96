"""Callbacks that watch the training: collapse, and how well the score separates."""

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import bank, metrics, shifts


@keras.saving.register_keras_serializable("sddns_tf")
class CollapseMonitor(keras.callbacks.Callback):
    """Says when self-distillation has collapsed, in which direction, and what to try.

    Two collapses are known. *Uniform*: the teacher gives every prototype the same probability, its
    entropy stays near ln K. *One prototype*: it gives all probability to one prototype whatever
    the image, its entropy is near 0 and the features of all images look alike. The centre works
    against the second and for the first, the teacher temperature the other way round.

    Looks at means over windows of `window` steps. A collapse is reported once.

    Args:
        window: Steps of a window.
        patience: Windows in a row that must look collapsed.
        uniform_above: `teacher_entropy`, relative to ln K, above which outputs count as uniform.
        one_prototype_below: `teacher_entropy` below which they may count as one prototype.
        feature_std_below: `feature_std` below which features count as alike.
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
        one_prototype_below=0.05,
        feature_std_below=0.1,
        stop_training=False,
    ):
        super().__init__()
        self.window = window
        self.patience = patience
        self.uniform_above = uniform_above
        self.one_prototype_below = one_prototype_below
        self.feature_std_below = feature_std_below
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
        self._seen, self._sums = 0, np.zeros(2)

    def on_train_batch_end(self, batch, logs=None):
        """At the end of each window, look at its means."""
        seen = batch + 1
        if seen - self._seen < self.window or self.collapse:
            return
        sums = seen * np.array([float(logs["teacher_entropy"]), float(logs["feature_std"])])
        entropy, feature_std = (sums - self._sums) / (seen - self._seen)
        self._seen, self._sums = seen, sums
        suspect = self._diagnose(entropy, feature_std)
        self._windows = self._windows + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        if suspect and self._windows >= self.patience:
            self._report(suspect, entropy, feature_std)

    def _diagnose(self, entropy, feature_std):
        if not np.isfinite(entropy) or entropy > self.uniform_above:
            return "uniform"
        if entropy < self.one_prototype_below and feature_std < self.feature_std_below:
            return "one prototype"
        return None

    def _report(self, collapse, entropy, feature_std):
        self.collapse = collapse
        advice = {
            "uniform": (
                "the teacher gives all prototypes the same probability. Try a lower "
                "`teacher_temperature`, a `negative_weight` that ramps up later, or a lower "
                "learning rate"
            ),
            "one prototype": (
                "the teacher gives all images the same prototype. Try a higher "
                "`teacher_temperature`, a lower `center_momentum`, or a lower learning rate"
            ),
        }[collapse]
        keras.utils.io_utils.print_msg(
            f"\nCollapse ({collapse}) at step {int(self.model.step)}: {advice}. Seen over "
            f"{self.patience * self.window} steps: teacher_entropy={entropy:.4f} (1: uniform, "
            f"0: one-hot), feature_std={feature_std:.4f} (0: all features alike)."
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
            "feature_std_below": self.feature_std_below,
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
            name = shift if isinstance(shift, str) else shift.__name__
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
