"""The names inside Keras that the package uses although they are not public: all in one place."""

import keras
import tensorflow as tf


def layers_of(network: keras.Layer) -> list[keras.Layer]:
    """Return a layer and all layers inside it, at any depth."""
    return list(network._flatten_layers(include_self=True, recursive=True))


def inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer itself, or the one that scales no loss inside one that does."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def batches_counted(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Return batches that an optimizer was given, those that it only accumulated included.

    `optimizer.iterations` counts its updates.
    """
    return tf.convert_to_tensor(inner(optimizer)._iterations)


def learning_rate_of(
    optimizer: keras.optimizers.Optimizer,
) -> keras.Variable | keras.optimizers.schedules.LearningRateSchedule:
    """Return the learning rate of an optimizer as it was given: a variable or a schedule."""
    return inner(optimizer)._learning_rate
