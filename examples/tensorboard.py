"""Watch a training run in TensorBoard: losses, views, negatives, and how well scores separate.

    pip install -e ".[examples]" tensorboard
    python examples/tensorboard.py
    tensorboard --logdir=tensorboard_output

The scalars are the losses, metrics that reveal a collapse (`teacher_entropy`,
`mean_output_entropy`, `feature_std`), learning rate and teacher momentum, and `auroc_rot90` and
`auroc_perm4`, which say how well scores tell held-out images from the same images after a shift,
without labels or anomalies. The images are views of eight photographs, their negatives and, every
second epoch, histograms of scores. Takes about one minute on two CPU cores. The photograph of grass
comes with scikit-image.
"""

import pathlib
import sys

import keras
import numpy as np
import skimage.data
from absl import app, flags

import sddns_tf

FLAGS = flags.FLAGS
flags.DEFINE_string("output_dir", "tensorboard_output", "Folder to write logs to.")
flags.DEFINE_integer("epochs", 6, "Number of epochs.", lower_bound=1)
flags.DEFINE_integer("steps", 20, "Steps per epoch.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Random seed.")

IMAGE_SIZE = 32
BATCH_SIZE = 48


def crops(rows, count, generator):
    """Return crops of a photograph of grass between two rows, uint8 `(count, 32, 32, 3)`."""
    grass = skimage.data.grass()
    tops = generator.integers(rows[0], rows[1] - IMAGE_SIZE + 1, count)
    lefts = generator.integers(0, grass.shape[1] - IMAGE_SIZE + 1, count)
    squares = [
        grass[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y, x in zip(tops, lefts, strict=True)
    ]
    return np.repeat(np.stack(squares)[..., np.newaxis], 3, axis=-1)


def main(argv):
    """Train and write logs for TensorBoard."""
    # This file is called like the package `tensorboard`, and would be imported instead of it.
    here = pathlib.Path(__file__).resolve().parent
    sys.path = [path for path in sys.path if pathlib.Path(path).resolve() != here]
    del argv
    keras.utils.set_random_seed(FLAGS.seed)
    generator = np.random.default_rng(FLAGS.seed)
    training, held_out = crops((0, 350), 2_000, generator), crops((350, 512), 200, generator)
    model = sddns_tf.SelfDistillation(
        backbone=sddns_tf.VisionTransformer(
            IMAGE_SIZE, patch_size=4, hidden_dim=96, depth=3, num_heads=3
        ),
        views=sddns_tf.MultiCrop(IMAGE_SIZE, local_views=2),
        negatives=sddns_tf.Negatives("rot90", source="in_distribution"),
        head=sddns_tf.ProjectionHead(num_prototypes=256, hidden_dim=256, bottleneck_dim=64),
        seed=FLAGS.seed,
    )
    model.compile(keras.optimizers.AdamW(1e-3))
    batches = sddns_tf.data.load(training, batch_size=BATCH_SIZE, shuffle=True, drop_remainder=True)
    model.fit(
        batches.repeat(),
        steps_per_epoch=FLAGS.steps,
        epochs=FLAGS.epochs,
        shuffle=False,
        verbose=2,
        callbacks=[
            sddns_tf.callbacks.CollapseMonitor(),
            # Before TensorBoard, which writes what is in the logs by then.
            sddns_tf.callbacks.OODProbe(training[:500], held_out),
            sddns_tf.callbacks.pictures.TrainingPictures(
                FLAGS.output_dir, training[:500], held_out, every=2
            ),
            keras.callbacks.TensorBoard(FLAGS.output_dir),
        ],
    )
    print(f"Now run: tensorboard --logdir={FLAGS.output_dir}")


if __name__ == "__main__":
    app.run(main)
