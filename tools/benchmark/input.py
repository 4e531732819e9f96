"""Training steps fed from image files, against the same step on one batch in memory.

The files are a folder of PNG images and, if it is in `TFDS_DATA_DIR`, `cifar10`. Then short epochs
of `fit`, against the same while tf.data tunes the pipeline, whose end waits for the tuning thread.
"""

import itertools
import os
import pathlib
import tempfile

import numpy as np
import tensorflow as tf

import sddns_tf
from tools.benchmark import harness, models

BATCH, STEPS = 64, 3
# What the end of an epoch waits for depends on how long the epoch took.
EPOCHS = (2, 3, 5, 7)


def run(settings):
    """Yield a record for each kind of file."""
    model = models.training_model((32, 4, 96, 3, 3))
    step = tf.function(model.train_step, autograph=False)

    def fed_by(batches):
        def steps():
            for images in itertools.islice(batches, STEPS):
                step({"images": images, "auxiliary": images})["loss"].numpy()

        return steps

    with tempfile.TemporaryDirectory() as folder:
        write_png_files(folder, 640 if settings.quick else 6_400)
        sources = {"a folder of PNG files": {"source": f"folder:{folder}", "image_size": 32}}
        if os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")):
            sources["TFDS cifar10"] = {"source": "tfds:cifar10"}
        for name, source in sources.items():
            batches = sddns_tf.data.load(
                **source, batch_size=BATCH, shuffle=True, drop_remainder=True
            )
            read = iter(batches.repeat())
            sides = fed_by(read), fed_by(itertools.repeat(next(read)))
            times = harness.take_turns(*sides, settings.rounds)
            yield harness.rates(f"input, {name}", "a batch in memory", times, STEPS * BATCH)
    yield whole_epochs(model, settings.rounds)


def whole_epochs(model, rounds):
    """Return the record of epochs of `fit`, of several lengths."""
    batch = BATCH // 2
    images = np.zeros((batch * max(EPOCHS), 32, 32, 3), np.uint8)
    batches = sddns_tf.data.load(images, batch_size=batch)
    batches = sddns_tf.data.with_auxiliary(batches, batches)
    options = tf.data.Options()
    options.autotune.enabled = True

    def fit(batches):
        for steps in EPOCHS:
            model.fit(batches.take(steps), verbose=0)

    sides = (lambda: fit(batches)), (lambda: fit(batches.with_options(options)))
    times = harness.take_turns(*sides, rounds)
    return harness.rates("input, epochs of `fit`", "tuned by tf.data", times, sum(EPOCHS) * batch)


def write_png_files(folder, count):
    """Write smooth images of 32 px, which compress like photographs."""
    smooth = tf.image.resize(models.random_images(count, 8), (32, 32)).numpy().astype(np.uint8)
    for index, image in enumerate(smooth):
        (pathlib.Path(folder) / f"{index}.png").write_bytes(tf.io.encode_png(image).numpy())
