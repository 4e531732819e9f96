r"""Measure how bank size, compression, k and temperature affect a detector's AUROC and speed.

    python -m tools.research.ablate_score --detector=results/auxiliary-rot90-0.keras \
        --data=tfds:cifar10@train --test=tfds:cifar10@test[5000:] --ood=tfds:cifar100,tfds:dtd32

Extracts the features once, scores them with each setting, and prints a Markdown table with the mean
AUROC over the OOD sets and the microseconds per image of the score alone. One setting varies at a
time; the others are those of the paper: the whole bank, all neighbors, temperature 0.04.
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf

from sddns_tf import bank, metrics
from sddns_tf.cli import sources
from sddns_tf.features import extract_features


def several(number):
    """Return the type of an argument that takes several numbers, separated by commas."""
    return lambda text: [number(part) for part in text.split(",")]


def parse(argv):
    """Return settings of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--detector", required=True, help="detector whose backbone to use (.keras)")
    add("--data", required=True, help="source of the bank's images (split: train)")
    add("--test", required=True, help="source of fresh normal images (split: test)")
    add("--ood", required=True, help="sources of OOD images, separated by commas (split: test)")
    add("--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR")
    add("--limit", type=int, default=2000, help="largest number of images to score per set")
    add(
        "--bank_sizes",
        type=several(int),
        default="50,500,5000",
        help="sizes to which to compress the bank",
    )
    add("--neighbors", type=several(int), default="1,10,100", help="values of k")
    add("--temperatures", type=several(float), default="0.01,0.02,0.08,0.16")
    add("--seed", type=int, default=0, help="seed of the rows drawn at random")
    return parser.parse_args(argv)


def compressed_banks(settings, features, metric):
    """Yield name, rows and weights of each smaller bank."""
    order = np.random.default_rng(settings.seed).permutation(len(features))
    for size in settings.bank_sizes:
        if size >= len(features):
            continue
        yield f"{size:,} drawn at random", features[order[:size]], None
        for method, name in (("kmeans", "k-means"), ("kcenter", "k-center")):
            yield (
                f"{size:,} by {name}, weighted",
                *bank.compress(features, size, method=method, metric=metric),
            )


def variants(settings, features, metric):
    """Yield name, bank, weights and score options for each row of the table."""
    yield f"all {len(features):,} images", features, None, {}
    for name, rows, weights in compressed_banks(settings, features, metric):
        yield name, rows, weights, {}
    for k in settings.neighbors:
        yield f"all, {k} nearest", features, None, {"k": k}
    for temperature in settings.temperatures:
        yield f"all, temperature {temperature:g}", features, None, {"temperature": temperature}


def measure(normal, ood, rows, weights, metric, options):
    """Return the mean AUROC, and the microseconds of the score per image (best of three)."""
    rows = tf.constant(rows)

    @tf.function
    def score(features):
        return bank.ood_score(features, rows, weights=weights, metric=metric, **options)

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


def main(argv=None):
    """Extract the features, vary the score, print the table."""
    settings = parse(argv)
    detector = keras.models.load_model(settings.detector)
    extractor, shape = detector.extractor, sources.seen_by(detector)

    def features_of(option, source, limit=None):
        images = sources.read(option, source, data_dir=settings.data_dir, limit=limit, **shape)
        return extract_features(extractor, images, verbose=0)

    test = sources.parse("test", settings.test, "test")
    normal = features_of("test", test, settings.limit)
    ood = [
        features_of("ood", source, settings.limit)
        for source in sources.parse_list("ood", [settings.ood], "test")
    ]
    features = features_of("data", sources.parse("data", settings.data, "train"))
    print("| bank and score | mean AUROC | microseconds per image |\n|---|---|---|")
    for name, rows, weights, options in variants(settings, features, extractor.metric):
        auroc, microseconds = measure(normal, ood, rows, weights, extractor.metric, options)
        print(f"| {name} | {auroc:.4f} | {microseconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
