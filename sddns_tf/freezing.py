"""Which layers of networks are frozen, kept where Keras forgets it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from sddns_tf.keras_private import layers_of


@contextlib.contextmanager
def thawed(network: keras.Layer) -> Iterator[None]:
    """Inside this context, a network that is frozen as a whole can be trained.

    Args:
        network: Keras model or layer; one with weights to train is left alone.
    """
    if network.trainable and (network.trainable_weights or not network.weights):
        yield
        return
    frozen = [layer for layer in layers_of(network) if not layer.trainable]
    set_throughout(network, True)
    yield
    for layer in frozen:
        set_throughout(layer, False)


def frozen_layers(*networks: keras.Layer) -> list[int]:
    """Return which layers of networks are frozen, as `freeze_layers` takes it."""
    return [i for i, layer in enumerate(_layers_of_all(networks)) if not layer.trainable]


def freeze_layers(frozen: list[int], *networks: keras.Layer) -> None:
    """Freeze the layers of networks that `frozen_layers` named, and no others."""
    # Parents come first: what they pass on to their sublayers is not the last word.
    for index, layer in enumerate(_layers_of_all(networks)):
        layer.trainable = index not in frozen


def set_throughout(network: keras.Layer, trainable: bool) -> None:
    """Freeze or thaw all layers of a network: Keras passes on to sublayers only what changes.

    Args:
        network: Keras model or layer.
        trainable: Whether it can be trained.
    """
    network.trainable = not trainable
    network.trainable = trainable


def _layers_of_all(networks):
    return [layer for network in networks for layer in layers_of(network)]
