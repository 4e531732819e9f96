r"""Local detectors: scoring a map, against a ViT-S/16 forward pass, and building from many images.

Each bank is built in a separate process, to measure its peak memory. The time is compared with that
of the smallest set, scaled by the number of images. The feature maps are those of one convolution,
28 x 28 places of 384 channels, because the network is not what is measured. To build only one size,
such as 100,000 images:

    python -m tools.benchmark.places --images=100000
"""

import argparse
import json
import resource
import subprocess
import sys

from tools.benchmark import harness

CHANNELS = 160
# Side of the map of a 224 px image, rows of the bank, and principal components that are compared.
# The default is all channels and 5,000 rows.
SCORES = ((28, 10_000, None), (28, 10_000, 64), (28, 5_000, None), (14, 10_000, None))
IMAGES = (1_000, 10_000)


def run(settings):
    """Yield records of scoring and of building."""
    yield from scores(settings)
    smallest = None
    for count in (16, 32) if settings.quick else IMAGES:
        measured = measured_apart(count, settings.threads)
        smallest = smallest or (measured["building"], count)
        expected = smallest[0] * count / smallest[1]
        times = [measured["building"]] * 3, [expected] * 3
        record = harness.durations(f"building, {count:,} images", "linear growth", times)
        yield {**record, "peak_memory_mb": measured["peak_memory_mb"]}


def scores(settings):
    """Yield a record of scoring each size of map, against a forward pass of the transformer."""
    import numpy as np
    import tensorflow as tf

    import sddns_tf
    from tools.benchmark import models

    shape = models.scoring_shape(settings)
    shape = shape if settings.quick else (224, *shape[1:])
    network = tf.function(models.vit(*shape))
    image = tf.zeros((1, shape[0], shape[0], 3))
    rng = np.random.default_rng(0)
    for side, rows, components in SCORES:
        extractor = one_convolution(side, CHANNELS, components)
        bank = rng.normal(size=(rows, extractor.feature_dim)).astype(np.float32)
        maps = rng.normal(size=(20, side, side, extractor.feature_dim)).astype(np.float32)
        detector = sddns_tf.Detector.from_features(extractor, bank, maps)
        reduce = extractor.principal or tf.identity
        score = tf.function(lambda x, d=detector, reduce=reduce: d.scores(reduce(x))["ood_score"])
        channels = tf.constant(rng.normal(size=(1, side, side, CHANNELS)).astype(np.float32))

        def ours(score=score, channels=channels):
            return score(channels).numpy()

        times = harness.take_turns(ours, lambda: network(image).numpy(), settings.rounds)
        name = f"score of {side} x {side} places of {CHANNELS} channels, {rows:,} rows"
        if components:
            name += f", by {components} components"
        yield harness.durations(name, "ViT-S/16 forward", times)


def one_convolution(side, channels, components=None):
    """Return a fast extractor of maps `(side, side, channels)` from 224 px images."""
    import keras

    from sddns_tf.features import FeatureExtractor

    keras.utils.set_random_seed(0)
    images = keras.Input((224, 224, 3))
    stride = 224 // side
    maps = keras.layers.Conv2D(channels, stride, stride, name="maps")(images)
    network = keras.Model(images, keras.layers.GlobalAveragePooling2D()(maps))
    return FeatureExtractor(network, layers="maps", components=components)


def measured_apart(count, threads):
    """Return what `main` prints for a number of images, run in a separate process."""
    options = [f"--images={count}", f"--threads={threads}"]
    command = [sys.executable, "-m", "tools.benchmark.places", *options]
    result = subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(count, threads):
    """Return the CPU seconds to build a bank of places, and the peak memory."""
    import time

    import numpy as np

    from sddns_tf.building import bank_of_places

    harness.pin_threads(threads)
    extractor = one_convolution(28, 384)
    noise = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), dtype=np.uint8)
    batches = (noise[: count - first] for first in range(0, count, 32))
    start = time.process_time()
    bank_of_places(extractor, batches, np.ones((28, 28), bool), 5_000, verbose=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"building": time.process_time() - start, "peak_memory_mb": round(peak)}


def main(argv=None):
    """Print the result of `measure` as JSON."""
    parser = argparse.ArgumentParser(prog="places", description="Build a bank of places.")
    parser.add_argument("--images", type=int, default=1_000, help="images to build it from")
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow's threads")
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.images, options.threads)))


if __name__ == "__main__":
    main()
