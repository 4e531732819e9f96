"""Values that change with the training step: learning rate, momentum, temperature, weights.

A schedule is a function of the step, so that nothing has to be set from outside and a resumed run
continues where it left off. Each is a `keras.optimizers.schedules.LearningRateSchedule`, so it can
be the learning rate of any Keras optimizer, and used wherever `SelfDistillation` takes a schedule.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
import tensorflow as tf

from sddns_tf.validation import check_int, check_number


@keras.saving.register_keras_serializable("sddns_tf")
class Constant(keras.optimizers.schedules.LearningRateSchedule):
    """The same value at every step.

    Args:
        value: Float.
    """

    def __init__(self, value: Any) -> None:
        check_number("value", value)
        self.value = float(value)

    def __call__(self, step: int) -> tf.Tensor:
        """Return the value; `step` is ignored."""
        del step
        return tf.constant(self.value, tf.float32)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"value": self.value}


@keras.saving.register_keras_serializable("sddns_tf")
class Linear(keras.optimizers.schedules.LearningRateSchedule):
    """Linear from one value to another, constant before and after.

    Args:
        start: Value up to `start_step`.
        end: Value from `end_step` on, even if that is the first step.
        end_step: Step at which `end` is reached.
        start_step: Step at which the change begins.

    Example:
        >>> ramp = Linear(0.0, 1.0, start_step=300, end_step=600)
        >>> float(ramp(450))
        0.5
    """

    def __init__(self, start: float, end: float, end_step: int, start_step: int = 0) -> None:
        check_number("start", start)
        check_number("end", end)
        check_int("start_step", start_step, low=0)
        check_int("end_step", end_step, low=0)
        if end_step < start_step:
            raise ValueError(
                "`end_step` must not come before `start_step`. Received: "
                f"start_step={start_step}, end_step={end_step}"
            )
        self.start = start
        self.end = end
        self.end_step = end_step
        self.start_step = start_step

    def __call__(self, step: int) -> tf.Tensor:
        """Return the value at `step`, a float32 scalar."""
        step, length = tf.cast(step, tf.float32), self.end_step - self.start_step
        if length:
            progress = tf.clip_by_value((step - self.start_step) / length, 0.0, 1.0)
        else:
            progress = tf.cast(step >= self.end_step, tf.float32)
        return self.start + (self.end - self.start) * progress

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "start": self.start,
            "end": self.end,
            "end_step": self.end_step,
            "start_step": self.start_step,
        }


@keras.saving.register_keras_serializable("sddns_tf")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0 to `start`, then half a cosine from `start` to `end`.

    Without warm-up it is the plain cosine that DINO uses for weight decay (0.04 to 0.4) and
    teacher momentum (0.996 to 1).

    Args:
        start: Value at the end of the warm-up.
        end: Value at `total_steps` and after. If all steps are warm-up, it comes one step later.
        total_steps: Step at which `end` is reached, warm-up included.
        warmup_steps: Steps of the warm-up.

    Example:
        >>> learning_rate = WarmupCosine(2e-3, 1e-6, total_steps=1000, warmup_steps=100)
        >>> float(learning_rate(100))
        0.002

    Reference:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers",
        arXiv 2104.14294, section 3.2.
    """

    def __init__(self, start: float, end: float, total_steps: int, warmup_steps: int = 0) -> None:
        check_number("start", start)
        check_number("end", end)
        check_int("total_steps", total_steps)
        check_int("warmup_steps", warmup_steps, low=0)
        if not warmup_steps <= total_steps:
            raise ValueError(
                "`warmup_steps` must lie between 0 and `total_steps`. Received: "
                f"warmup_steps={warmup_steps}, total_steps={total_steps}"
            )
        self.start = start
        self.end = end
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> tf.Tensor:
        """Return the value at `step`, a float32 scalar."""
        step = tf.cast(step, tf.float32)
        warmup = self.start * step / max(self.warmup_steps, 1)
        length = max(self.total_steps - self.warmup_steps, 1)
        progress = tf.clip_by_value((step - self.warmup_steps) / length, 0.0, 1.0)
        cosine = self.end + 0.5 * (self.start - self.end) * (1.0 + tf.cos(math.pi * progress))
        return tf.where(step < self.warmup_steps, warmup, cosine)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            "start": self.start,
            "end": self.end,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable("sddns_tf")
class GrowingMomentum(keras.optimizers.schedules.LearningRateSchedule):
    """Momentum of a moving average that remembers about the last tenth of the steps so far.

    `min(end, (1 + step) / (10 + step))`: 0.1 at first, 0.92 after 100 steps, 0.996 after 2,240.

    Args:
        end: Largest value.

    Reference:
        `num_updates` of `tf.train.ExponentialMovingAverage`.
    """

    def __init__(self, end: float = 0.996) -> None:
        check_number("end", end, 0.0, 1.0)
        self.end = end

    def __call__(self, step: int) -> tf.Tensor:
        """Return the value at `step`, a float32 scalar."""
        step = tf.cast(step, tf.float32)
        return tf.minimum(self.end, (1.0 + step) / (10.0 + step))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"end": self.end}


def get(value: Any) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a schedule from a number, a schedule or the serialized form of one.

    Args:
        value: Float, int, `LearningRateSchedule`, or a dictionary from
            `keras.saving.serialize_keras_object`.

    Returns:
        A `LearningRateSchedule`.
    """
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return Constant(value)
    raise ValueError(
        "Expected a number or a keras.optimizers.schedules.LearningRateSchedule. "
        f"Received: {value!r}"
    )
