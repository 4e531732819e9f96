"""Our networks, training steps and detectors to time, and images of noise."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

import sddns_tf
from sddns_tf.features import FeatureExtractor, extract_features


def random_images(count, size, seed=0):
    """Return images of noise, uint8 `(count, size, size, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def training_shape(settings):
    """Return image size, patch, width, depth and heads of ViT-S/4 at 32 px, or a small one."""
    return (32, 4, 96, 3, 3) if settings.quick else (32, 4, 384, 12, 6)


def scoring_shape(settings):
    """Return the same for ViT-S/16 at 256 px, or a small one."""
    return (64, 16, 192, 6, 3) if settings.quick else (256, 16, 384, 12, 6)


def vit(size, patch, dim, depth, heads):
    """Return our vision transformer of a given shape."""
    return sddns_tf.VisionTransformer(
        image_size=size, patch_size=patch, hidden_dim=dim, depth=depth, num_heads=heads
    )


@contextlib.contextmanager
def dtype_policy(name):
    """Set the precision of models that are made in the block."""
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


class ReadyViews(sddns_tf.MultiCrop):
    """Views that were made in advance."""

    def __init__(self, views, images):
        super().__init__(**views.get_config())
        self._made = views(images, [0, 1])

    def __call__(self, images, seed):
        """Return the same views each time."""
        del images, seed
        return self._made


class ReadyNegatives(sddns_tf.Negatives):
    """Negatives that were made in advance."""

    def __init__(self, negatives, views, images):
        super().__init__(**negatives.get_config())
        self._made = negatives(views, images, images, [0, 2])

    def __call__(self, views, images, auxiliary, seed):
        """Return the same negatives each time."""
        del views, images, auxiliary, seed
        return self._made


def training_model(shape, prototypes=4096, local_views=2, ready_made_for=None, make_backbone=vit):
    """Return a compiled `SelfDistillation` with negatives from auxiliary images.

    Args:
        shape: Image size, patch, width, depth and heads of the backbone.
        prototypes: Outputs of the head.
        local_views: Number of small views.
        ready_made_for: Images whose views are drawn once and reused at every step, or None.
        make_backbone: Function from the numbers of `shape` to the backbone.

    Returns:
        A compiled `SelfDistillation`.
    """
    views = sddns_tf.MultiCrop(shape[0], local_views=local_views)
    negatives = sddns_tf.Negatives("rot90", source="auxiliary")
    if ready_made_for is not None:
        negatives = ReadyNegatives(negatives, views, ready_made_for)
        views = ReadyViews(views, ready_made_for)
    model = sddns_tf.SelfDistillation(
        backbone=make_backbone(*shape),
        views=views,
        negatives=negatives,
        head=sddns_tf.ProjectionHead(num_prototypes=prototypes),
        # As in the PyTorch step.
        **sddns_tf.SelfDistillation.PAPER,
    )
    model.compile(keras.optimizers.AdamW(1e-4, weight_decay=0.04))
    return model


def train_step(shape, batch, *, policy="float32", jit_compile=False, ready_made=False, **options):
    """Return a function that does one training step on a batch and returns the loss.

    Args:
        shape: As for `training_model`.
        batch: Number of images.
        policy: Keras dtype policy.
        jit_compile: Whether XLA compiles the step.
        ready_made: Whether views are made in advance.
        **options: Further arguments of `training_model`.
    """
    images = tf.constant(random_images(batch, shape[0]))
    with dtype_policy(policy):
        model = training_model(shape, ready_made_for=images if ready_made else None, **options)
    step = tf.function(model.train_step, autograph=False, jit_compile=jit_compile)
    data = {"images": images, "auxiliary": images}
    return lambda: step(data)["loss"].numpy()


def operations(model, batch):
    """Count the operations that a training step gives TensorFlow to optimize.

    They are every node of the step's graph, including constants and placeholders, and every node of
    the functions that it calls, each function counted once.

    Args:
        model: From `training_model`.
        batch: Number of images.

    Returns:
        Int.
    """
    images = tf.TensorSpec((batch, model.views.image_size, model.views.image_size, 3), tf.uint8)
    step = tf.function(model.train_step, autograph=False)
    traced = step.get_concrete_function({"images": images, "auxiliary": images})
    graph = traced.graph.as_graph_def()
    return len(graph.node) + sum(len(part.node_def) for part in graph.library.function)


def multiplications(shape, prototypes, local_views, batch):
    """Return the number of multiplications in the matrix products of one training step.

    The teacher runs 2 global views forward. The student runs 3 global views and twice the local
    views forward and backward, which costs three times as much as forward alone. The last block
    computes one token from the keys and values of all.
    """
    size, patch, dim, depth, _ = shape

    def one(side):
        tokens = (side // patch) ** 2 + 1
        block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
        last_block = (2 * tokens + 10) * dim**2 + 2 * tokens * dim
        head = dim * 2048 + 2048**2 + 2048 * 256 + 256 * prototypes
        return (depth - 1) * block + last_block + 3 * patch**2 * dim * tokens + head

    return batch * (2 * one(size) + 9 * one(size) + 6 * local_views * one(size // 2))


def detector(shape, bank_size=50_000):
    """Return a detector with random weights and a random bank, which do not affect its speed."""
    extractor = FeatureExtractor(vit(*shape), shape[0], shape[0])
    bank = np.random.default_rng(0).normal(size=(bank_size, shape[2])).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    calibration = extract_features(extractor, random_images(200, shape[0], seed=2), verbose=0)
    return sddns_tf.Detector.from_features(extractor, bank, calibration)
