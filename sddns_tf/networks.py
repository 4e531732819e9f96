"""Checks of networks, and independent copies that are verified to be equal."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sddns_tf.freezing import set_throughout
from sddns_tf.keras_private import layers_of

# Largest difference in an output that rounding may cause, relative to its size.
_TOLERANCE = 1e-3

# Teachers whose heads see standardized features, as long as they live.
_standardized: weakref.WeakSet = weakref.WeakSet()

# Backbones with changed attributes: how many replicas need them so, and the layers' own values.
_changes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()

# What `tf.name_scope` accepts.
_SCOPE = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")


def copy_of(network: keras.Layer, input_shape: tuple, trainable: bool = True) -> keras.Layer:
    """Return a network with the same layers and values, but variables of its own.

    The copy of a subclass of functional models, such as `ConvNet`, is a plain functional model.
    What a layer holds besides its weights, such as the mean of an adapted `Normalization`, is
    copied too. Both networks are then run on one input and must agree.

    Args:
        network: Built Keras model or layer.
        input_shape: Shape of one input without the batch axis, on which both are compared.
        trainable: Whether the copy can be trained.

    Returns:
        The copy.

    Raises:
        ValueError: If the copy shares variables with the network or gives other outputs.

    Example:
        >>> teacher = copy_of(student, (32, 32, 3), trainable=False)
    """
    copy = _same_configuration(network)
    probe = _probe(input_shape)
    if not copy.built:
        copy(probe, training=False)
    copy.set_weights(network.get_weights())
    use_new_weights(copy)
    if trainable:
        copy.trainable = True
    else:
        set_throughout(copy, False)
    if {id(v) for v in copy.variables} & {id(v) for v in network.variables}:
        raise ValueError(
            "A copy must have variables of its own, but the one that get_config and from_config "
            f"make of {network.name!r} shares some with it. Received: {type(network).__name__}"
        )
    _check_equal(network, copy, probe)
    return copy


def use_new_weights(network: keras.Layer) -> None:
    """Let layers with `adapt`, such as `Normalization`, derive what they use from their weights.

    They do so when Keras loads a file, but not when weights are assigned.

    Args:
        network: Keras model or layer.
    """
    for layer in layers_of(network):
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()


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


def _probe(input_shape):
    """Return one input that looks like normalized noise, always the same."""
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


def check_backbone(backbone: keras.Model, sizes: tuple) -> int:
    """Build a backbone if needed, and check that it can be trained.

    Args:
        backbone: What was passed as the backbone.
        sizes: Sides in pixels of the images that it must take.

    Returns:
        Number of its features.

    Raises:
        ValueError: If it is not a Keras model, does not take images of each size, does not give one
            vector per image, is quantized, or has names that TensorFlow refuses.
    """
    if not isinstance(backbone, keras.Model):
        raise ValueError(
            "`backbone` must be a keras.Model from normalized images (B, h, w, 3) to features "
            f"(B, D). Received: {backbone!r}"
        )
    check_names(backbone)
    quantized = [layer.name for layer in layers_of(backbone) if _is_quantized(layer)]
    if quantized:
        raise ValueError(
            "A quantized backbone cannot be trained: train it first, then call `quantize` on a "
            f"copy. Received: quantized layers {quantized[:3]}"
        )
    fixed = getattr(backbone, "input_shape", None)
    dimension = 0
    for size in sizes:
        if fixed is not None and any(side not in (None, size) for side in tuple(fixed)[1:3]):
            raise ValueError(
                f"`backbone` must take views with the sides {sizes}. Build it with an input shape "
                "of (None, None, 3), or use MultiCrop(local_views=0) with its image_size. "
                f"Received: a backbone that takes only inputs of shape {fixed}"
            )
        try:
            if not backbone.built:
                backbone(tf.zeros((1, size, size, 3)), training=False)
            spec = backbone.compute_output_spec(keras.KerasTensor((None, size, size, 3)))
        except Exception as error:
            raise ValueError(
                f"`backbone` does not take views of {size} px; the views have the sides "
                f"{sizes}, see MultiCrop's `image_size` and `local_size`. Received: {error}"
            ) from error
        shape = getattr(spec, "shape", None)
        if shape is None or len(shape) != 2 or shape[-1] is None:
            raise ValueError(
                "`backbone` must give one vector (B, D) per image; add "
                "keras.layers.GlobalAveragePooling2D() to one that gives feature maps, and leave "
                "out further outputs. "
                f"Received: output shape {keras.tree.map_structure(lambda x: x.shape, spec)} "
                f"for images of {size} px"
            )
        dimension = shape[-1]
    return dimension


def check_head(head: keras.Layer, feature_dim: int) -> int:
    """Build a head if needed, and check that it takes features.

    Args:
        head: What was passed as the head.
        feature_dim: Number of the backbone's features.

    Returns:
        Number of its outputs.

    Raises:
        ValueError: If it does not map features `(B, D)` to logits `(B, K)`.
    """
    text = f"`head` must map features (B, {feature_dim}), the backbone's, to logits (B, K). "
    if not isinstance(head, keras.Layer):
        raise ValueError(f"{text}Received: head={head!r}")
    try:
        if not head.built:
            head.build((None, feature_dim))
        shape = head.compute_output_spec(keras.KerasTensor((None, feature_dim))).shape
    except Exception as error:
        raise ValueError(f"{text}Received: {head.name!r}, which fails: {error}") from error
    if len(shape) != 2 or shape[-1] is None:
        raise ValueError(f"{text}Received: {head.name!r} with outputs of shape {shape}")
    return shape[-1]


def projected(head: keras.Layer, features: tf.Tensor, training: bool) -> tf.Tensor:
    """Return a head's logits `(V, B, K)` for features `(V, B, D)`.

    A Sequential or functional head that was made for `(B, D)` takes all views as one batch.
    """
    if len(getattr(head, "input_shape", None) or ()) != 2:
        return head(features, training=training)
    logits = head(tf.reshape(features, [-1, features.shape[-1]]), training=training)
    return tf.reshape(logits, [features.shape[0], -1, logits.shape[-1]])


def check_float32(*networks: keras.Layer) -> None:
    """Raise a `ValueError` unless networks keep their weights in float32.

    Args:
        *networks: Keras models or layers.
    """
    for network in networks:
        for variable in network.weights:
            if keras.backend.is_float_dtype(variable.dtype) and variable.dtype != "float32":
                raise ValueError(
                    "Weights to train must be float32: a moving average in less loses small steps. "
                    "To compute in half precision use the dtype policy 'mixed_bfloat16' or "
                    f"'mixed_float16'. Received: {variable.path} of {variable.dtype}"
                )


def weight_losses(*networks: keras.Layer) -> list[tf.Tensor]:
    """Return the losses of weight regularizers, such as a layer's `kernel_regularizer`.

    Args:
        *networks: Keras models or layers.

    Raises:
        ValueError: If a network has losses of its outputs, which would be those of the last of
            several calls.
    """
    found = []
    for network in networks:
        weights = network.trainable_weights
        found += (own := [w.regularizer(w) for w in weights if w.regularizer is not None])
        if len(network.losses) > len(own):
            raise ValueError(
                "Layers to train must have no losses but those of weight regularizers: no "
                f"`activity_regularizer` and no `add_loss`. Received: {network.name!r}, whose "
                f"call adds {len(network.losses) - len(own)} losses"
            )
    return found


def remember_standardized(backbone: keras.Model) -> None:
    """Remember that a backbone's features are told apart only once they are standardized."""
    _standardized.add(backbone)


def is_standardized(backbone: keras.Model) -> bool:
    """Return whether `remember_standardized` was called for a backbone in this process."""
    return backbone in _standardized


def check_names(network: keras.Layer) -> None:
    """Raise a `ValueError` if TensorFlow rejects a layer's name as the scope of a graph.

    Args:
        network: Keras model or layer.
    """
    refused = [layer.name for layer in layers_of(network) if not _SCOPE.fullmatch(layer.name)]
    if refused:
        raise ValueError(
            "Layers must have names of letters, digits, '_', '.', '-' and '/', beginning with a "
            "letter or digit: TensorFlow refuses others when a step is compiled. Rename them, as "
            f"in `Dense(8, name='dense_8')`. Received: {refused[:3]}"
        )


def check_scope(layer: keras.Layer | None) -> None:
    """Raise a `ValueError` if a layer was built outside the strategy's scope.

    Otherwise `fit` would fail, with an assertion that explains nothing.

    Args:
        layer: Keras layer, or None.
    """
    if layer is None or not tf.distribute.has_strategy():
        return
    strategy = tf.distribute.get_strategy()
    for variable in layer.variables:
        if not strategy.extended.variable_created_in_scope(variable.value):
            raise ValueError(
                f"{layer.name!r} must be built within the same `strategy.scope()` as the model. "
                f"Received: {variable.path}, built outside of {describe_strategy(strategy)}"
            )


def describe_strategy(strategy: tf.distribute.Strategy) -> str:
    """Return what error messages call a distribution strategy."""
    return f"{type(strategy).__name__} ({strategy.num_replicas_in_sync} replicas)"


def trained_batch_norms(student: keras.Layer, teacher: keras.Layer) -> list[keras.Layer]:
    """Return the teacher's batch normalizations whose counterparts in the student are trained."""
    pairs = zip(_batch_norms(student), _batch_norms(teacher), strict=True)
    return [copy for layer, copy in pairs if layer.trainable]


def moving_statistics(norms: list[keras.Layer]) -> list[keras.Variable]:
    """Return moving means and variances of batch normalizations."""
    return [variable for norm in norms for variable in (norm.moving_mean, norm.moving_variance)]


@contextlib.contextmanager
def normalizing_by_batch(
    backbone: keras.Layer, norms: list, part: Any, momentum: float
) -> Iterator[None]:
    """Let a frozen backbone, called in training mode, normalize by its batch and drop nothing.

    What drops something is told by its `rate`, which Keras' dropouts and `StochasticDepth` have.
    Other layers that are random in training, such as `GaussianNoise`, stay random.

    Its moving statistics follow its own batches. The student's, averaged a second time, would fit
    the teacher's weights too late: the features of a deep network then become constant within the
    first steps.

    Args:
        backbone: The teacher's.
        norms: Its batch normalizations, from `trained_batch_norms`.
        part: `replicas.Part` of the batch.
        momentum: Share of the moving statistics that stays.
    """
    statistics = moving_statistics(norms)
    before = [tf.identity(variable) for variable in statistics]
    drops = [layer for layer in layers_of(backbone) if getattr(layer, "rate", None)]
    wanted = [(drop, "rate", 0.0) for drop in drops]
    for norm in norms:
        wanted += [(norm, "trainable", True), (norm, "momentum", 0.0)]
    with _changed(backbone, wanted):
        yield
    for variable, old in zip(statistics, before, strict=True):
        new = part.mean(tf.convert_to_tensor(variable))
        variable.assign(momentum * old + (1.0 - momentum) * new)


@contextlib.contextmanager
def _changed(backbone, wanted):
    """Inside this context, attributes of a backbone's layers have the wanted values.

    Replicas share the layers, and one may come in or leave while another waits inside, for what a
    synchronized normalization adds up: the first one changes them, the last one changes them back.
    """
    with _lock:
        inside, own = _changes.get(backbone, (0, []))
        own = own or [(layer, name, getattr(layer, name)) for layer, name, _ in wanted]
        _changes[backbone] = inside + 1, own
        _set_attributes(wanted)
    try:
        yield
    finally:
        with _lock:
            inside, own = _changes.pop(backbone)
            if inside > 1:
                _changes[backbone] = inside - 1, own
            else:
                _set_attributes(own)


def _set_attributes(values):
    for layer, name, value in values:
        setattr(layer, name, value)


@contextlib.contextmanager
def moving_statistics_of(backbone: keras.Layer, part: Any) -> Iterator[None]:
    """Make moving statistics follow the images of a part; without a part, restore them afterward.

    Replicas average theirs, so that all have the same network to save.

    Args:
        backbone: The student's.
        part: `replicas.Part` of the batch, or None.
    """
    statistics = moving_statistics(_batch_norms(backbone))
    before = [tf.identity(variable) for variable in statistics] if part is None else []
    yield
    if part is None:
        for variable, value in zip(statistics, before, strict=True):
            variable.assign(value)
    elif tf.distribute.get_strategy().num_replicas_in_sync > 1:
        for variable in statistics:
            variable.assign(part.mean(tf.convert_to_tensor(variable)))


def _batch_norms(network):
    return [one for one in layers_of(network) if isinstance(one, keras.layers.BatchNormalization)]


def _is_quantized(layer):
    return getattr(layer, "quantization_mode", None) is not None
