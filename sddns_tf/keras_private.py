"""The private names of Keras that the package uses, all in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf


def layers_of(network: keras.Layer) -> list[keras.Layer]:
    """Return a layer and all layers inside it, at any depth."""
    return list(network._flatten_layers(include_self=True, recursive=True))


def inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer itself or, if it only scales the loss, the one inside it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def batches_counted(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Return how many batches an optimizer was given, including those it only accumulated.

    `optimizer.iterations` counts only its updates.
    """
    return tf.convert_to_tensor(inner(optimizer)._iterations)


def decays(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Return whether an optimizer's `weight_decay` acts on a variable."""
    return inner(optimizer)._use_weight_decay(variable)


def learning_rate_of(
    optimizer: keras.optimizers.Optimizer,
) -> keras.Variable | keras.optimizers.schedules.LearningRateSchedule:
    """Return the learning rate of an optimizer as it was given: a variable or a schedule."""
    return inner(optimizer)._learning_rate


@contextlib.contextmanager
def fused_adam(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Inside this context, Adam updates each variable with one operation instead of Keras' forty.

    TensorFlow has a kernel for Adam's formula. It updates Keras' own moments, and everything around
    it (schedules, decay, accumulation, loss scaling, saving) stays Keras'. Optimizers with another
    formula, AMSGrad included, are left alone.

    Args:
        optimizer: Built optimizer, or a loss-scaling one around it.
    """
    adam = inner(optimizer)
    if type(adam).update_step is not keras.optimizers.Adam.update_step or adam.amsgrad:
        yield
        return
    step = tf.cast(adam.iterations, tf.float32) + 1.0
    beta_1, beta_2 = tf.constant(adam.beta_1, tf.float32), tf.constant(adam.beta_2, tf.float32)
    scalars = {
        "beta1_power": tf.pow(beta_1, step),
        "beta2_power": tf.pow(beta_2, step),
        "lr": tf.cast(adam.learning_rate, tf.float32),
        "beta1": beta_1,
        "beta2": beta_2,
        "epsilon": tf.constant(adam.epsilon, tf.float32),
    }

    def update_step(gradient, variable, learning_rate):
        del learning_rate  # The one above, read once for all variables.
        index = adam._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=adam._momentums[index].handle,
            v=adam._velocities[index].handle,
            grad=tf.cast(gradient, variable.dtype),
            **{name: tf.cast(value, variable.dtype) for name, value in scalars.items()},
        )

    vars(adam)["update_step"] = update_step
    try:
        yield
    finally:
        # Replicas share the optimizer: another one may have removed it already.
        vars(adam).pop("update_step", None)
