"""All views and negatives of pairs of 32 px images, against Pillow image by image.

Each pair of an image and an auxiliary image has 28 views: 2 global and 8 local views of the image,
and 1 global and 8 local negatives of each of the two.
"""

import tensorflow as tf

import sddns_tf
from tools.benchmark import harness, models
from tools.benchmark.partners import pillow

PILLOW_PAIRS, REPEATS = 8, 4


def run(settings):
    """Yield one record."""
    theirs = pillow.all_views()
    crops = sddns_tf.MultiCrop(32, local_views=8)
    negatives = sddns_tf.Negatives("rot90", source="both")
    images, auxiliary = models.random_images(64, 32), models.random_images(64, 32, seed=1)

    # A compilation takes half a minute.
    @tf.function(jit_compile=not settings.quick)
    def step(images, auxiliary, seed):
        return crops(images, seed), negatives(crops, images, auxiliary, seed + 1)

    arguments = tf.constant(images), tf.constant(auxiliary), tf.constant([0, 1])
    times = harness.take_turns(
        lambda: [
            tf.nest.map_structure(lambda group: group.numpy(), step(*arguments))
            for _ in range(REPEATS)
        ],
        lambda: [theirs(*pair) for pair in zip(images[:PILLOW_PAIRS], auxiliary, strict=False)],
        settings.rounds,
    )
    yield harness.rates(
        "views",
        "Pillow, image by image",
        times,
        REPEATS * len(images),
        PILLOW_PAIRS,
        unit="image pairs/s",
    )
