"""`gelu`: the exact function and its gradient, with less kept for it."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from sddns_tf.gelu import gelu


def test_values_and_gradients_are_those_of_the_formula():
    x = np.linspace(-8, 8, 101).astype("float32")
    inputs = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = gelu(inputs)
        first = tape.gradient(outputs, inputs)
    np.testing.assert_allclose(outputs, x * stats.norm.cdf(x), atol=1e-6)
    np.testing.assert_allclose(first, stats.norm.cdf(x) + x * stats.norm.pdf(x), atol=1e-6)
    expected = (2 - x * x) * stats.norm.pdf(x)
    np.testing.assert_allclose(outer.gradient(first, inputs), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs = tf.cast(tf.linspace(-5.0, 5.0, 200), dtype)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = gelu(inputs)
    slope = tape.gradient(outputs, inputs)
    assert outputs.dtype == slope.dtype == dtype
    wanted = tf.cast(tf.nn.gelu(tf.cast(inputs, tf.float32)), dtype)
    np.testing.assert_array_equal(tf.cast(outputs, tf.float32), tf.cast(wanted, tf.float32))


def test_a_function_keeps_its_input_alone_for_the_gradient():
    def kept(function):
        size = 12_345
        traced = tf.function(function).get_concrete_function(tf.TensorSpec([size]))
        forward, _ = traced._delayed_rewrite_functions.forward_backward()
        return sum(output.shape.num_elements() == size for output in forward.graph.outputs)

    # Its result, under two names, and its input.
    assert kept(gelu) == 3
    assert kept(tf.nn.gelu) > 3


def test_tflite_computes_it_as_one_operation():
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    traced = tf.function(gelu).get_concrete_function(tf.TensorSpec([4]))
    model = tf.lite.TFLiteConverter.from_concrete_functions([traced]).convert()
    interpreter = litert.Interpreter(model_content=model)
    assert [one["op_name"] for one in interpreter._get_ops_details()] == ["GELU"]
