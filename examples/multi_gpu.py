"""Train on all GPUs of a machine: only the model has to be made inside the strategy's scope.

    python examples/multi_gpu.py
    python examples/multi_gpu.py --virtual_cpus=2

The second command tries the same on a machine without GPUs: it divides the processor into two
devices, which is slower. Batches are global: with 64 images on two devices, each gets 32. Gradients
and the teacher's center are averaged over all devices, so the result is the same as on one device
with the same batches.

Prints images per second and the loss of each epoch. Takes about one minute on two CPU cores. The
photograph of grass comes with scikit-image (`pip install -e ".[examples]"`).
"""

import time

import keras
import numpy as np
import skimage.data
import tensorflow as tf
from absl import app, flags

import sddns_tf

FLAGS = flags.FLAGS
flags.DEFINE_integer("virtual_cpus", 0, "Number of devices into which to divide the CPU.")
flags.DEFINE_integer("batch_size", 64, "Images per step, over all devices.", lower_bound=1)
flags.DEFINE_integer("steps", 10, "Steps in each of two epochs.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Random seed.")

IMAGE_SIZE = 32


def make_strategy():
    """Return a `MirroredStrategy` over all GPUs, or over virtual CPUs."""
    if not FLAGS.virtual_cpus:
        return tf.distribute.MirroredStrategy()
    # Before anything else uses the devices.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * FLAGS.virtual_cpus,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(FLAGS.virtual_cpus)])


def make_model():
    """Return the compiled model. Call this in the strategy's scope."""
    model = sddns_tf.SelfDistillation(
        backbone=sddns_tf.VisionTransformer(
            IMAGE_SIZE, patch_size=4, hidden_dim=96, depth=4, num_heads=3
        ),
        views=sddns_tf.MultiCrop(IMAGE_SIZE, local_views=2),
        negatives=sddns_tf.Negatives("rot90", source="in_distribution"),
        head=sddns_tf.ProjectionHead(num_prototypes=512, hidden_dim=256, bottleneck_dim=64),
        seed=FLAGS.seed,
    )
    model.compile(keras.optimizers.AdamW(1e-3))
    return model


def make_images():
    """Return crops of a photograph of grass, uint8 `(2000, 32, 32, 3)`."""
    generator = np.random.default_rng(FLAGS.seed)
    grass = skimage.data.grass()
    corners = generator.integers(0, grass.shape[0] - IMAGE_SIZE + 1, (2_000, 2))
    squares = [grass[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y, x in corners]
    return np.repeat(np.stack(squares)[..., np.newaxis], 3, axis=-1)


def main(argv):
    """Train for two epochs on all devices."""
    del argv
    strategy = make_strategy()
    replicas = strategy.num_replicas_in_sync
    print(f"{replicas} devices, {FLAGS.batch_size} images per step")
    keras.utils.set_random_seed(FLAGS.seed)
    with strategy.scope():
        model = make_model()
    # Only whole batches: a small last one could leave a device without images.
    batches = sddns_tf.data.load(
        make_images(), batch_size=FLAGS.batch_size, shuffle=True, drop_remainder=True
    ).repeat()
    for epoch in range(2):
        start = time.perf_counter()
        history = model.fit(batches, steps_per_epoch=FLAGS.steps, shuffle=False, verbose=0)
        rate = FLAGS.steps * FLAGS.batch_size / (time.perf_counter() - start)
        note = " (including compilation)" if epoch == 0 else ""
        print(f"loss {history.history['loss'][0]:.3f}, {rate:.0f} images/s{note}")


if __name__ == "__main__":
    app.run(main)
