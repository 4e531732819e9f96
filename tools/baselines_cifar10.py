r"""What the method is compared with in docs/results.md, on the same images and network.

    python tools/baselines_cifar10.py --data_dir=TFDS --auxiliary_exclude=FILE \
        --baseline=rotation --minutes=20 --output_dir=results

- `pixels`: distance to the nearest bank image, after PCA of the pixels to 64 dimensions.
- `untrained`: the network's features as they are drawn.
- `rotation`: the network trained to tell by how many quarter turns an image was rotated.

Writes `BASELINE-SEED.json` in the form of `tools/reproduce_cifar10.py`, whose flags these are.

Reference: Gidaris et al., "Unsupervised representation learning by predicting image rotations",
arXiv 1803.07728.
"""

import json
import os
import pathlib
import time

import command_line
import reproduce_cifar10 as method
from absl import flags

FLAGS = flags.FLAGS
BASELINES = ("pixels", "untrained", "rotation")


class PixelScorer:
    """Scores as a detector does, by the nearest image in the first principal components."""

    def __init__(self, bank, calibration):
        import numpy as np
        from sklearn.decomposition import PCA
        from sklearn.neighbors import NearestNeighbors

        self.pca = PCA(64, random_state=0).fit(bank.reshape(len(bank), -1) / 255.0)
        self.neighbours = NearestNeighbors(n_neighbors=1).fit(self.components(bank))
        scores = self.neighbours.kneighbors(self.components(calibration))[0]
        self.threshold = float(np.quantile(scores, 0.95))

    def components(self, images):
        """Coordinates of each image along the principal components."""
        return self.pca.transform(images.reshape(len(images), -1) / 255.0)

    def predict(self, images, batch_size=None, verbose=0):
        """OOD score and decision of each image."""
        import numpy as np

        scores = self.neighbours.kneighbors(self.components(np.asarray(images)))[0][:, 0]
        return {"ood_score": scores, "is_ood": scores > self.threshold}


def rotation_network(images, minutes):
    """Backbone trained by `fit` to name the quarter turns of each image, and the images it saw."""
    import keras
    import tensorflow as tf

    from sddns_tf import data, image_ops, schedules

    keras.utils.set_random_seed(FLAGS.seed)
    backbone = method.convolutional(FLAGS.width)
    inputs = keras.Input((method.SIZE, method.SIZE, 3))
    model = keras.Model(inputs, keras.layers.Dense(4)(backbone(inputs)))

    def rotated(batch):
        turns = tf.random.uniform([tf.shape(batch)[0]], 0, 4, tf.int32)
        batch = tf.image.random_flip_left_right(batch)
        every = tf.stack([tf.image.rot90(batch, k) for k in range(4)], axis=1)
        return image_ops.normalize(tf.gather(every, turns, batch_dims=1)), turns

    batches = data.load(images, batch_size=FLAGS.batch_size, shuffle=True, drop_remainder=True)
    batches = batches.repeat().map(rotated)

    def compiled(learning_rate):
        model.compile(
            keras.optimizers.AdamW(learning_rate, weight_decay=0.04),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    start_weights = model.get_weights()
    compiled(0.0).fit(batches, steps_per_epoch=3, verbose=0)
    start = time.perf_counter()
    model.fit(batches, steps_per_epoch=20, verbose=0)
    steps = FLAGS.steps or max(1, int(60 * minutes / (time.perf_counter() - start) * 20))
    model.set_weights(start_weights)
    schedule = schedules.WarmupCosine(2e-3, 1e-5, steps, warmup_steps=steps // 10)
    history = compiled(schedule).fit(batches, steps_per_epoch=steps, verbose=2).history
    return backbone, steps, history


def main():
    """One baseline, if it is not there yet."""
    target = pathlib.Path(FLAGS.output_dir) / f"{FLAGS.baseline}-{FLAGS.seed}.json"
    if target.exists():
        command_line.say(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    import keras

    import sddns_tf

    FLAGS.strategy = "none"  # It leaves out no probe.
    images, test_images = method.read("cifar10", "train"), method.read("cifar10", "test")
    bank, calibration = images[: FLAGS.bank_images], test_images[0:5000:2]
    start, steps, history = time.perf_counter(), 0, {}
    if FLAGS.baseline == "pixels":
        scorer = PixelScorer(bank, calibration)
    else:
        keras.utils.set_random_seed(FLAGS.seed)
        backbone = method.convolutional(FLAGS.width)
        if FLAGS.baseline == "rotation":
            backbone, steps, history = rotation_network(images, FLAGS.minutes)
        scorer = sddns_tf.Detector.from_images(
            backbone,
            bank_images=bank,
            calibration_images=calibration,
            image_size=method.SIZE,
            verbose=0,
        )
    record = {
        "flags": {"strategy": FLAGS.baseline, "seed": FLAGS.seed, "width": FLAGS.width},
        "steps": steps,
        "images": steps * FLAGS.batch_size,
        "seconds": time.perf_counter() - start,
        "history": {key: [float(x) for x in values] for key, values in history.items()},
        **method.evaluate(scorer, test_images[1:5000:2]),
    }
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1))
    os.replace(unfinished, target)
    print(json.dumps({key: round(row["auroc"], 3) for key, row in record["ood"].items()}))


if __name__ == "__main__":
    method.define_flags()
    flags.DEFINE_enum("baseline", "untrained", BASELINES, "What to measure.")
    command_line.run(main)
