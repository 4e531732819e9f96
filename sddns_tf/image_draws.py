"""Random numbers of images, fixed by the seed and an image's place in the global batch."""

import tensorflow as tf


def uniform(shape, seed, **kwargs):
    """Uniform numbers whose last axis runs over the images of this replica.

    Under a distribution strategy each replica holds a contiguous part of the global batch. It
    draws what one device would draw for the whole of it and keeps its own part, so that an image
    gets the same numbers on any number of devices. All replicas must hold equally many images.

    Args:
        shape: Ints or scalar tensors; the last one is the number of this replica's images.
        seed: Two integers, the same on all replicas.
        **kwargs: Of `tf.random.stateless_uniform`: `minval`, `maxval`, `dtype`.

    Returns:
        Tensor of the given shape.

    Example:
        >>> angles = image_draws.uniform([tf.shape(images)[0]], seed=[0, 1], maxval=6.28)
    """
    context = tf.distribute.get_replica_context()
    replicas = context.num_replicas_in_sync if context else 1
    if replicas == 1:
        return tf.random.stateless_uniform(shape, seed, **kwargs)
    *outer, count = shape
    everyone = tf.random.stateless_uniform([*outer, count * replicas], seed, **kwargs)
    first = context.replica_id_in_sync_group * count
    return everyone[..., first : first + count]
