"""One global batch on any number of replicas: each replica's part, and means over the whole."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf


class Part(NamedTuple):
    """Which images of the global batch a replica holds.

    Attributes:
        first: Index of its first image in the global batch, int or scalar int32.
        total: Number of images in the global batch, int or scalar int32.
        held: Number of images that the replica computes with, at least 1, int or scalar int32.
        weight: Weight of the replica's mean in a mean over the replicas: its number of images,
            relative to the average. Float or scalar float32; 0 for a replica that got no images and
            computes with a stand-in.
    """

    first: tf.Tensor | int
    total: tf.Tensor | int
    held: tf.Tensor | int
    weight: tf.Tensor | float

    def mean(self, values: Any) -> Any:
        """Average over all images of the global batch, given means over those of each replica.

        Args:
            values: Tensor, or a structure of tensors, each a mean over this replica's images.

        Returns:
            Tensors of the same structure, the same on all replicas.
        """
        return self.mean_of_shares(tf.nest.map_structure(self.share, values))

    def share(self, mean: Any) -> Any:
        """Return what this replica's mean adds to the mean over the global batch."""
        if isinstance(self.weight, float):
            return mean
        return tf.cast(self.weight, mean.dtype) * mean

    def mean_of_shares(self, shares: Any) -> Any:
        """Average over the replicas what each has weighted with `share`.

        Gradients of a share are shares: what reaches other replicas through means over the global
        batch is weighted only once.

        Args:
            shares: Tensor, or a structure of tensors.

        Returns:
            Tensors of the same structure, the same on all replicas.
        """
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync == 1:
            return shares
        # A tensor without a device, such as the zero gradient of a variable that nothing uses,
        # cannot go to other machines.
        shares = tf.nest.map_structure(tf.identity, shares)
        return context.all_reduce(tf.distribute.ReduceOp.MEAN, shares)


_current = threading.local()

# More collectives than any model has.
_KEYS_OF_ONE = 100_000
_numbered: weakref.WeakSet = weakref.WeakSet()
_strategies = itertools.count(1)


def number_apart(strategy: tf.distribute.Strategy) -> None:
    """Keep the collectives of two strategies in one process from being mixed up.

    TensorFlow numbers the collectives of each `MirroredStrategy` from the same start, and remembers
    the shape for each number for the life of the process: the second strategy would fail with
    "Shape mismatch in the collective instance".

    Args:
        strategy: The current strategy.
    """
    keys = getattr(strategy.extended, "_collective_keys", None)
    table = getattr(keys, "_instance_key_table", None)
    if type(strategy) is not tf.distribute.MirroredStrategy or not table or strategy in _numbered:
        return
    _numbered.add(strategy)
    offset = _KEYS_OF_ONE * next(_strategies)
    for numbers in table.values():
        for device in numbers:
            numbers[device] += offset


def part_of(images: tf.Tensor) -> Part:
    """Return which part of the global batch the images of this replica are.

    Where the number of images is static, all replicas hold equally many. Otherwise, the last batch
    of an epoch may be uneven, and the replicas tell each other how many they hold.

    Args:
        images: Images of this replica, `(B, ...)`.

    Returns:
        `Part`.
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync if context else 1
    count = images.shape[0] if images.shape[0] is not None else tf.shape(images)[0]
    if replicas == 1:
        return Part(0, count, count, 1.0)
    replica = context.replica_id_in_sync_group
    if images.shape[0] is not None:
        return Part(replica * count, replicas * count, count, 1.0)
    counts = context.all_gather(tf.reshape(count, [1]), axis=0)
    total = tf.reduce_sum(counts)
    # A stand-in uses the random numbers of the first image: there are none beyond the last.
    first = tf.where(count > 0, tf.reduce_sum(counts[:replica]), 0)
    weight = tf.cast(count * replicas, tf.float32) / tf.cast(total, tf.float32)
    return Part(first, total, tf.maximum(count, 1), weight)


def at_least_one(images: tf.Tensor) -> tf.Tensor:
    """Return the images, or a black one as a stand-in for a replica that got none.

    A mean over no images is NaN, and stays NaN whatever its weight.

    Args:
        images: Images of this replica, `(B, H, W, 3)`.

    Returns:
        Tensor `(max(B, 1), H, W, 3)`.
    """
    if images.shape[0] is not None:
        return images
    missing = tf.maximum(1 - tf.shape(images)[0], 0)
    padded = tf.pad(images, [[0, missing], *[[0, 0]] * (images.shape.rank - 1)])
    return tf.ensure_shape(padded, images.shape)


def applied(network: Callable, images: tf.Tensor) -> tf.Tensor:
    """Return a network's outputs for the images of this replica, which may be none.

    The network then sees a stand-in: oneDNN's fused convolutions fail on an empty batch.

    Args:
        network: Function from images `(B, H, W, 3)` to a tensor `(B, ...)`.
        images: Images of this replica.

    Returns:
        Tensor `(B, ...)`.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1 or images.shape[0] is not None:
        return network(images)
    return network(at_least_one(images))[: tf.shape(images)[0]]


@contextlib.contextmanager
def holding(part: Part) -> Iterator[None]:
    """Inside this context, random numbers are drawn for this part of the global batch.

    Args:
        part: From `part_of`.
    """
    before = getattr(_current, "part", None)
    _current.part = part
    try:
        yield
    finally:
        _current.part = before


def uniform(shape: Any, seed: Any, **kwargs) -> tf.Tensor:
    """Draw uniform numbers whose last axis runs over the images of this replica.

    Under a distribution strategy each replica holds a contiguous part of the global batch. It draws
    what one device would draw for the whole batch and keeps its own part, so that an image gets the
    same numbers on any number of devices.

    Args:
        shape: Ints or scalar tensors; the last one is the number of this replica's images, or a
            multiple of it where each image has several views, which then lie together.
        seed: Two integers, the same on all replicas.
        **kwargs: Arguments of `tf.random.stateless_uniform`: `minval`, `maxval`, `dtype`.

    Returns:
        Tensor of the given shape.

    Example:
        >>> angles = uniform([tf.shape(images)[0]], seed=[0, 1], maxval=6.28)
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync if context else 1
    if replicas == 1:
        return tf.random.stateless_uniform(shape, seed, **kwargs)
    *outer, count = shape
    part = getattr(_current, "part", None)
    if part is None:  # Outside of a training step all replicas hold equally many images.
        first, total = context.replica_id_in_sync_group * count, replicas * count
    else:
        views = count // part.held
        first, total = part.first * views, part.total * views
    everyone = tf.random.stateless_uniform([*outer, total], seed, **kwargs)
    return everyone[..., first : first + count]


def local_devices(strategy: tf.distribute.Strategy) -> int:
    """Return how many devices of this process a strategy spreads a batch over.

    Workers of a cluster count as one: each of them goes through the whole set of images.

    Args:
        strategy: Such as `model.distribute_strategy`.

    Returns:
        Int.
    """
    mirrored = isinstance(strategy, tf.distribute.MirroredStrategy)
    return strategy.num_replicas_in_sync if mirrored else 1


def on_all_devices(function: Callable, strategy: tf.distribute.Strategy) -> Callable:
    """Let each device of this process compute an equal part of a batch.

    Args:
        function: Function from a tensor `(B, ...)` to another, row by row. Its variables were made
            in the scope of the strategy.
        strategy: Such as `model.distribute_strategy`.

    Returns:
        The same function, for batches whose size is a multiple of `local_devices`.
    """
    devices = local_devices(strategy)
    if devices == 1:
        return function

    @tf.function(autograph=False, reduce_retracing=True)
    def run(parts: Any) -> Any:
        return strategy.run(function, args=(parts,))

    def on_all(batch: tf.Tensor) -> tf.Tensor:
        parts = tf.split(batch, devices)
        values = strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )
        return tf.concat(strategy.experimental_local_results(run(values)), axis=0)

    return on_all
