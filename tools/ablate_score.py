r"""How the bank's size, its compression, k and the temperature change a detector's AUROC and speed.

    python tools/ablate_score.py --detector=docs/results/auxiliary-rot90-0.keras \
        --data=tfds:cifar10@train --test=tfds:cifar10@test[5000:] --ood=tfds:cifar100,tfds:dtd

Extracts the features once, scores them with each setting, and prints a table in Markdown: mean
AUROC over the OOD sets, and microseconds per image of the score alone. Settings other than the one
that varies are those of the paper: the whole bank, all neighbours, temperature 0.04.
"""

import time

import command_line
from absl import flags

FLAGS = flags.FLAGS


def define_flags():
    """All flags of the program."""
    command_line.define_data_flags()
    flags.DEFINE_string("detector", None, "Detector whose backbone is looked at (.keras).")
    flags.DEFINE_string("data", None, "Source of the bank's images (split: train).")
    flags.DEFINE_string("test", None, "Source of fresh normal images (split: test).")
    flags.DEFINE_list("ood", [], "Sources of OOD images, with commas between (split: test).")
    flags.DEFINE_integer("limit", 2000, "Score at most so many images of each set.", 1)
    flags.DEFINE_list("bank_sizes", ["50", "500", "5000"], "Sizes to compress the bank to.")
    flags.DEFINE_list("neighbors", ["1", "10", "100"], "Numbers of nearest images.")
    flags.DEFINE_list("temperatures", ["0.01", "0.02", "0.08", "0.16"], "Temperatures.")


def read_features(detector, flag, text, split, limit=None):
    """Features of a source's images, float32 `(N, D)`."""
    from sddns_tf.features import extract_features

    size = detector.extractor.resolution or detector.extractor.image_size
    one = command_line.source(flag, text, split)
    images = command_line.read(flag, one, FLAGS, size, limit=limit)
    return extract_features(detector.extractor, images, verbose=0)


def compressed_banks(features):
    """Name, rows and weights of each smaller bank."""
    import numpy as np

    from sddns_tf import bank

    order = np.random.default_rng(FLAGS.seed).permutation(len(features))
    for size in map(int, FLAGS.bank_sizes):
        if size >= len(features):
            continue
        yield f"{size:,} drawn at random", features[order[:size]], None
        for method in ("kmeans", "kcenter"):
            name = {"kmeans": "k-means", "kcenter": "k-centre"}[method]
            yield f"{size:,} by {name}, weighted", *bank.compress(features, size, method=method)


def settings(features):
    """Name, bank, weights and options of the score of each row."""
    yield f"all {len(features):,} images", features, None, {}
    for name, rows, weights in compressed_banks(features):
        yield name, rows, weights, {}
    for k in map(int, FLAGS.neighbors):
        yield f"all, {k} nearest", features, None, {"k": k}
    for temperature in map(float, FLAGS.temperatures):
        yield f"all, temperature {temperature:g}", features, None, {"temperature": temperature}


def measure(normal, ood, rows, weights, options):
    """Mean AUROC over the sets, and microseconds of the score per image, the best of three."""
    import numpy as np
    import tensorflow as tf

    from sddns_tf import bank, metrics

    rows = tf.constant(rows)

    @tf.function
    def score(features):
        return bank.ood_score(features, rows, weights=weights, **options)

    normal_scores = score(tf.constant(normal)).numpy()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        score(tf.constant(normal)).numpy()
        seconds.append(time.perf_counter() - start)
    aurocs = [
        metrics.ood_metrics(normal_scores, score(tf.constant(other)).numpy())["auroc"]
        for other in ood
    ]
    return float(np.mean(aurocs)), 1e6 * min(seconds) / len(normal)


def main():
    """Extract, vary, print."""
    for name in ("detector", "data", "test", "ood"):
        if not FLAGS[name].value:
            raise ValueError(f"--{name} is needed. Received: --{name}={FLAGS[name].value}")
    detector = command_line.load_keras("detector", FLAGS.detector)
    normal = read_features(detector, "test", FLAGS.test, "test", FLAGS.limit)
    ood = [read_features(detector, "ood", text, "test", FLAGS.limit) for text in FLAGS.ood]
    command_line.say("Extracting the bank's features")
    features = read_features(detector, "data", FLAGS.data, "train")
    print("| bank and score | mean AUROC | microseconds per image |\n|---|---|---|")
    for name, rows, weights, options in settings(features):
        auroc, microseconds = measure(normal, ood, rows, weights, options)
        print(f"| {name} | {auroc:.4f} | {microseconds:.0f} |", flush=True)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
