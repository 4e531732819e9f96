"""`NotFinite`: stops training, or rolls it back, when a number is not finite."""

from __future__ import annotations

from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from sddns_tf.callbacks import training_state
from sddns_tf.types import Array
from sddns_tf.validation import check_int


@keras.saving.register_keras_serializable("sddns_tf")
class NotFinite(keras.callbacks.Callback):
    """Stops training at the first step at which a loss or a weight is not finite.

    Put it before `Checkpoint` in the list of callbacks, so that only finite states are saved. It
    checks the losses and all weights after each step.

    Args:
        checkpoint: The run's `Checkpoint`, or `None`.
        rollbacks: How many times to return to the last state of `checkpoint` and continue at half
            the learning rate before stopping. Schedules go back as well; the images do not, so the
            run ends short by the steps that were undone.

    Raises:
        RuntimeError: In `fit`; the message gives the step, the learning rate, the first tensor
            that is not finite, and the last good state.

    Example:
        >>> kept = Checkpoint("run/checkpoint")
        >>> model.fit(batches, callbacks=[NotFinite(kept, rollbacks=3), kept])
    """

    def __init__(self, checkpoint: Any = None, rollbacks: int = 0) -> None:
        super().__init__()
        check_int("rollbacks", rollbacks, low=0)
        if rollbacks and checkpoint is None:
            raise ValueError(
                f"Rolling back needs `checkpoint`. Received: checkpoint=None, rollbacks={rollbacks}"
            )
        self.checkpoint = checkpoint
        self.rollbacks = rollbacks

    def on_train_begin(self, logs: Any = None) -> None:
        """Compile the check of the weights."""
        del logs
        self._rolled_back = 0
        if self.rollbacks:
            if self.checkpoint.model is not self.model:
                raise ValueError(
                    "Rolling back takes a `checkpoint` that is among the callbacks of `fit` too. "
                    f"Received: rollbacks={self.rollbacks} and a Checkpoint that is not"
                )
            training_state.learning_rate_level(self.model)  # Which must be one to scale.
        self._watched = [v for v in self.model.weights if keras.backend.is_float_dtype(v.dtype)]
        self._are_finite = tf.function(self._look)

    def on_train_batch_end(self, batch: Array, logs: Any = None) -> None:
        """Check the losses and weights; roll back or stop if one is not finite."""
        del batch
        found = [f"{name} (logged)" for name in ("positive_loss", "negative_loss", "loss")
                 if name in logs and not np.isfinite(float(logs[name]))]  # fmt: skip
        finite = np.asarray(self._are_finite())
        found += [v.path for v, good in zip(self._watched, finite, strict=True) if not good]
        if not found:
            return
        last = self.checkpoint and self.checkpoint.last()
        message = (
            f"Not finite at step {training_state.step_of(self.model)}, learning rate "
            f"{float(logs['learning_rate']):.3g}: first {found[0]}; {(~finite).sum()} of "
            f"{len(finite)} weights. Last good state: {last or 'none was kept'}."
        )
        if self._rolled_back >= self.rollbacks:
            raise RuntimeError(f"{message} Try a lower learning rate, or float32.")
        self._rolled_back += 1
        # Half of what it was here: on several machines another one may have halved it in the file.
        level = 0.5 * training_state.learning_rate_level(self.model)
        step = self.checkpoint.restore(self.model)
        training_state.scale_learning_rate(
            self.model, level / training_state.learning_rate_level(self.model)
        )
        self.checkpoint.save()
        self.model.reset_metrics()
        logging.warning("%s Continuing from step %d at half the learning rate.", message, step)

    def _look(self):
        values = [tf.convert_to_tensor(variable.value) for variable in self._watched]
        return tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in values])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        serialize = keras.saving.serialize_keras_object
        return {"checkpoint": serialize(self.checkpoint), "rollbacks": self.rollbacks}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the callback that `get_config` describes."""
        return cls(keras.saving.deserialize_keras_object(config["checkpoint"]), config["rollbacks"])
