"""Trace once what a training step does several times: equal blocks of a network share one graph."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import keras
import tensorflow as tf

_current = threading.local()


@contextlib.contextmanager
def repeats_once() -> Iterator[None]:
    """Inside this context, equal calls of `run_once` and `run_block` share one graph function.

    It is meant for a training step. With a ViT-S that is 36 blocks and the gradients of 24 of them;
    TensorFlow then traces, differentiates and optimizes only one block for each shape of the
    tokens. Weights are read once too, so they must not change before all blocks have run. Exports
    do without it, because not every converter can read graphs with functions.
    """
    before = getattr(_current, "functions", None)
    _current.functions = {}
    try:
        yield
    finally:
        _current.functions = before


def run_once(key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, reusing the graph of an earlier call with the same key.

    Args:
        key: Whatever distinguishes this function from others, apart from its arguments.
        function: Function to call. It must not change variables.
        *arguments: Arguments of the function: tensors, lists of tensors, or None.

    Returns:
        The result of the function.
    """
    functions = _functions()
    if functions is None:
        return function(*arguments)
    if key not in functions:
        # Inlining would put a copy in place of each call, and all copies would be optimized.
        attributes = {"_noinline": True}
        functions[key] = tf.function(function, autograph=False, experimental_attributes=attributes)
    return functions[key](*arguments)


def run_block(
    layer: keras.Layer, key: Hashable, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Call a function that uses the weights of a layer, reusing the graph of an equal layer.

    Args:
        layer: Built layer.
        key: Whatever distinguishes this layer from others, apart from its weights.
        function: Function to call, which uses the layer. It must not change variables.
        *arguments: Arguments of the function: tensors, or None.

    Returns:
        The result of the function.
    """
    weights = layer.weights

    def with_weights(values, *arguments):
        with keras.StatelessScope(list(zip(weights, values, strict=True))):
            return function(*arguments)

    if _functions() is None:
        return function(*arguments)
    key = key, *((tuple(weight.shape), weight.dtype) for weight in weights)
    return run_once(key, with_weights, [_read_once(weight) for weight in weights], *arguments)


def _read_once(weight):
    # Views of two sizes use the same weights.
    key = "read", id(weight), id(tf.compat.v1.get_default_graph())
    if key not in _current.functions:
        _current.functions[key] = tf.convert_to_tensor(weight.value)
    return _current.functions[key]


def _functions():
    return None if tf.executing_eagerly() else getattr(_current, "functions", None)
