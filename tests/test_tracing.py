"""One graph for equal blocks, one operation for Adam: the same numbers from fewer operations."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sddns_tf import tracing
from sddns_tf.keras_private import fused_adam
from tools.benchmark import models


def values_and_gradients(layers, inputs, once):
    """What a chain of layers gives, its gradients, and the functions in the graph."""

    def step():
        with tf.GradientTape() as tape:
            x = inputs
            for layer in layers:
                x = tracing.run_block(layer, "dense", layer, x)
            loss = tf.reduce_sum(x**2)
        return loss, tape.gradient(loss, [w.value for layer in layers for w in layer.weights])

    step = tf.function(tracing.repeats_once()(step) if once else step, autograph=False)
    calls = [n for n in step.get_concrete_function().graph.get_operations() if "Call" in n.type]
    return step(), calls


def test_equal_layers_share_a_graph_and_keep_their_weights():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(5, activation="tanh") for _ in range(3)]
    for layer in layers:
        layer.build((None, 5))
    inputs = tf.random.stateless_normal((4, 5), [0, 0])
    (loss, gradients), calls = values_and_gradients(layers, inputs, once=True)
    (expected, expected_gradients), none = values_and_gradients(layers, inputs, once=False)
    assert len(calls) == 6 and not none  # Forward and backward of each.
    assert len({call.get_attr("f").name for call in calls}) == 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_block_more_costs_few_operations():
    def count(depth):
        model = models.training_model((16, 8, 8, depth, 2), prototypes=16)
        return models.operations(model, batch=4)

    # 1,780 where every block is traced at each call and Adam moves by Keras' forty operations.
    assert count(3) - count(2) < 400


@pytest.mark.parametrize("steps", [None, 2], ids=["every batch", "accumulated"])
@pytest.mark.parametrize("kind", [keras.optimizers.Adam, keras.optimizers.AdamW])
def test_adam_by_one_operation_moves_as_keras_does(kind, steps):
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(4, 3)), random.normal(size=(4, 4, 3))

    def moved(fused):
        variable = keras.Variable(start, dtype="float32")
        optimizer = kind(schedule, gradient_accumulation_steps=steps)
        optimizer.build([variable])

        @tf.function(autograph=False)
        def step(gradient):
            if not fused:
                return optimizer.apply([gradient], [variable])
            with fused_adam(optimizer):
                return optimizer.apply([gradient], [variable])

        for gradient in gradients:
            step(tf.constant(gradient, tf.float32))
        return [keras.ops.convert_to_numpy(v) for v in (variable, *optimizer.variables)]

    # `1 - 0.999` is 5e-5 off in float32, of which the kernel takes the difference.
    for one, other in zip(moved(True), moved(False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
