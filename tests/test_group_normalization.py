"""`GroupNormalization`: Keras's layer, in less time."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sddns_tf.group_normalization import GroupNormalization


def pair_of_layers(channels, groups):
    """Return ours and Keras's with the same weights."""
    layers = [GroupNormalization(groups), keras.layers.GroupNormalization(groups)]
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=channels).astype("float32") for _ in range(2)]
    for layer in layers:
        layer.build((None, None, None, channels))
        layer.set_weights(weights)
    return layers


@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 8, 8, 16), 4), ((2, 5, 9, 6), 6), ((1, 1, 1, 8), 1)]
)
def test_values_and_gradients_equal_those_of_keras(shape, groups):
    maps = tf.constant(np.random.default_rng(1).normal(2.0, 3.0, shape), tf.float32)
    found = []
    for layer in pair_of_layers(shape[-1], groups):
        with tf.GradientTape() as tape:
            tape.watch(maps)
            outputs = layer(maps)
            loss = tf.reduce_sum(tf.sin(outputs))
        found.append([outputs, *tape.gradient(loss, [maps, *layer.trainable_variables])])
    for ours, keras_own in zip(*found, strict=True):
        np.testing.assert_allclose(ours, keras_own, rtol=1e-3, atol=2e-5)


def test_equal_values_become_the_bias():
    ours, _ = pair_of_layers(8, 2)
    outputs = ours(tf.fill([2, 4, 4, 8], 100.1))
    np.testing.assert_allclose(outputs, tf.broadcast_to(ours.beta, outputs.shape), atol=0.1)


def test_half_precision_keeps_its_moments_in_float32():
    layer = GroupNormalization(2, dtype="mixed_bfloat16")
    outputs = layer(tf.constant(np.random.default_rng(0).normal(30.0, 1.0, (1, 64, 64, 4))))
    assert outputs.dtype == tf.bfloat16
    assert abs(np.std(tf.cast(outputs, tf.float32)) - 1.0) < 0.02
    assert abs(np.mean(tf.cast(outputs, tf.float32))) < 0.02


def test_a_saved_layer_is_the_same(tmp_path):
    maps = keras.Input((None, None, 4))
    network = keras.Model(maps, pair_of_layers(4, 2)[0](maps))
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert isinstance(loaded.layers[-1], GroupNormalization)
    images = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype("float32")
    np.testing.assert_array_equal(network(images), loaded(images))
