"""An independent copy of a network, held equal to it on an image."""

import keras
import numpy as np
import tensorflow as tf

# Largest difference of an output, relative to its size, that rounding may make.
_TOLERANCE = 1e-3


def copy_of(network: keras.Layer, input_shape: tuple, trainable: bool = True) -> keras.Layer:
    """A network of the same class, configuration and values, with variables of its own.

    What a layer holds besides its weights, such as the mean of an adapted `Normalization`, is
    brought along. Both are then run on one input and must agree.

    Args:
        network: Built Keras model or layer.
        input_shape: Shape of one input without the batch axis, on which both are compared.
        trainable: Whether the copy can be trained.

    Returns:
        The copy.

    Raises:
        ValueError: If the copy shares variables with the network or answers otherwise.

    Example:
        >>> teacher = copy_of(student, (32, 32, 3), trainable=False)
    """
    copy = _same_configuration(network)
    probe = _probe(input_shape)
    if not copy.built:
        copy(probe, training=False)
    copy.set_weights(network.get_weights())
    for layer in _layers_of(copy):
        # Layers with `adapt` compute from their weights what they use.
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
    copy.trainable = trainable
    if {id(v) for v in copy.variables} & {id(v) for v in network.variables}:
        raise ValueError(
            "A copy must have variables of its own, but the one that get_config and from_config "
            f"make of {network.name!r} shares some with it. Received: {type(network).__name__}"
        )
    _check_equal(network, copy, probe)
    return copy


def _same_configuration(network):
    try:
        if isinstance(network, keras.Model):
            return keras.models.clone_model(network)
        return type(network).from_config(network.get_config())
    except Exception as error:
        raise ValueError(
            f"{network.name!r} cannot be copied: {type(network).__name__} needs `get_config` and "
            f"`from_config` that make another one like it. Received: {error}"
        ) from error


def _layers_of(network):
    return network._flatten_layers(include_self=True, recursive=True)


def _probe(input_shape):
    """One input that looks like normalized noise, always the same."""
    return tf.random.stateless_normal((1, *input_shape), seed=[0, 0])


def _check_equal(network, copy, probe):
    expected, received = (
        np.asarray(keras.ops.convert_to_numpy(one(probe, training=False)), np.float64)
        for one in (network, copy)
    )
    with np.errstate(invalid="ignore"):
        largest = np.max(np.abs(np.where(np.isfinite(expected), expected, 0.0)), initial=1e-6)
        difference = np.abs(expected - received)
    # Values that are not finite must be so in both.
    difference = np.where(np.isfinite(expected) | np.isfinite(received), difference, 0.0)
    difference = np.max(np.nan_to_num(difference, nan=np.inf))
    if not difference <= _TOLERANCE * largest:
        raise ValueError(
            f"A copy of {network.name!r} does not answer as it does: it holds state that is "
            "neither in its configuration nor in its weights. Make that state a weight "
            "(`add_weight`) or an argument in `get_config`. Received: outputs that differ by "
            f"{difference:.3g}, "
            f"where the largest is {largest:.3g}"
        )
