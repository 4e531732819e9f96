"""What a step does several times, traced once: all equal blocks of a network share one graph."""

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
    """While it lasts, a graph holds one function for all that `run_once` or `run_block` repeat.

    Around a training step, which runs 36 blocks of a ViT-S and the gradients of 24: TensorFlow
    traces, differentiates and optimizes six and four. Weights are read once too, so what changes
    them comes after all blocks. Exported graphs are made without: not all that reads them knows
    functions.
    """
    before = getattr(_current, "functions", None)
    _current.functions = {}
    try:
        yield
    finally:
        _current.functions = before


def run_once(key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function gives, by the graph that an earlier one of the same key made.

    Args:
        key: What tells functions apart, but for their arguments.
        function: What to compute. It changes no variable.
        *arguments: Of the function: tensors, lists of tensors, or None.

    Returns:
        What the function returns.
    """
    functions = _functions()
    if functions is None:
        return function(*arguments)
    if key not in functions:
        # Called, not put in the place of each call: all of them would be optimized anew.
        attributes = {"_noinline": True}
        functions[key] = tf.function(function, autograph=False, experimental_attributes=attributes)
    return functions[key](*arguments)


def run_block(
    layer: keras.Layer, key: Hashable, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Return what a function gives with the weights of a layer, as `run_once` does.

    Args:
        layer: Built layer.
        key: What tells layers apart, but for their weights.
        function: What to compute by the layer. It changes no variable.
        *arguments: Of the function: tensors, or None.

    Returns:
        What the function returns.
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
    """Views of two sizes pass the same weights."""
    key = "read", id(weight), id(tf.compat.v1.get_default_graph())
    if key not in _current.functions:
        _current.functions[key] = tf.convert_to_tensor(weight.value)
    return _current.functions[key]


def _functions():
    return None if tf.executing_eagerly() else getattr(_current, "functions", None)
