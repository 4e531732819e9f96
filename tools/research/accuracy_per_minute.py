r"""Compare small networks by what their features know after a few minutes of one core.

    python -m tools.research.accuracy_per_minute --data_dir=TFDS --json=accuracy_per_minute.json
    python -m tools.research.accuracy_per_minute --json=accuracy_per_minute.json --table_only

Trains each network on CIFAR-10 by self-distillation alone, with the constructor's defaults, two
global views, batches of 64 and `keras.optimizers.AdamW(1e-3)`, and looks at the accuracy of nearest
neighbors (standardized features) as time passes. Time is the CPU time of training steps without
the first one, which compiles: other programs on the machine matter little. Runs that the JSON file
has are not repeated.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from sddns_tf import files
from sddns_tf.cli.console import say
from tools.research import cifar10

BATCH_SIZE = 64


def candidates():
    """Return functions that make the networks, by name."""
    import sddns_tf
    from tools.research import networks

    def convnet(*stages, **options):
        return lambda: sddns_tf.ConvNet(stages or (32, 64, 128), **options)

    return {
        "`ConvNet()`, the default": convnet(),
        "the default with GELU": convnet(activation="gelu"),
        "the default with Keras's normalization": networks.plain,
        "half as wide": convnet(16, 32, 64),
        "twice as wide": convnet(64, 128, 256),
        "a fourth stage of 256 channels": convnet(32, 64, 128, 256),
        "two convolutions a stage": convnet(convolutions=2),
        "residual, batch normalization": networks.resnet,
        "depthwise": networks.depthwise,
        "vision transformer 96/4/3": lambda: networks.vit(cifar10.SIDE),
    }


def accuracy_of(model, normal):
    """Return how often nearest neighbors predict the class, with standardized features."""
    from sddns_tf import building

    def features(images):
        return model.predict(images, batch_size=256, verbose=0)

    mean, deviation = building.moments_of(features(normal.training[:10_000]))
    return cifar10.nearest_neighbor_accuracy(
        normal, lambda images: (features(images) - mean) / deviation
    )


def measure(normal, make_network, seed, minutes):
    """Train a network, and return its accuracy untrained and after each number of CPU minutes."""
    import keras

    import sddns_tf

    keras.utils.set_random_seed(seed)
    views = sddns_tf.MultiCrop(32, local_views=0)
    model = sddns_tf.SelfDistillation(make_network(), views, seed=seed)
    model.compile(keras.optimizers.AdamW(1e-3))
    batches = sddns_tf.data.load(
        normal.training, batch_size=BATCH_SIZE, shuffle=True, seed=seed, first_batch=0
    ).as_numpy_iterator()
    accuracy = {"0": accuracy_of(model, normal)}
    model.train_on_batch(next(batches))
    spent, images, left = 0.0, 0, sorted(minutes)
    while left:
        batch = next(batches)
        start = time.process_time()
        model.train_on_batch(batch)
        spent, images = spent + time.process_time() - start, images + BATCH_SIZE
        if spent >= 60 * left[0]:
            accuracy[f"{left.pop(0):g}"] = accuracy_of(model, normal)
    return {
        "parameters": model.teacher_backbone.count_params(),
        "images_per_second": images / spent,
        "accuracy": accuracy,
    }


def print_table(records):
    """Print a Markdown table with a row for each network and the accuracy of each seed."""
    marks = list(next(iter(records.values()))["accuracy"])
    print("| network | parameters | images/s |", *(f" {mark} min |" for mark in marks), sep="")
    print("|---|" + "--:|" * (2 + len(marks)))
    for name in dict.fromkeys(record["network"] for record in records.values()):
        found = [record for record in records.values() if record["network"] == name]
        rate = np.mean([record["images_per_second"] for record in found])
        cells = [name, f"{found[0]['parameters']:,}", f"{rate:.0f}"]
        for mark in marks:
            cells.append(" ".join(f"{record['accuracy'][mark]:.3f}" for record in found))
        print("|", " | ".join(cells), "|")


def main(argv=None):
    """Do the missing runs, then print the table of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR")
    add("--in_distribution", default="cifar10", help="TFDS data set of 32 px images with classes")
    add("--json", required=True, help="file of the records, which is added to")
    add("--minutes", default="1,2,4", help="CPU minutes after which to look")
    add("--seeds", default="0,1", help="seeds, separated by commas")
    add("--table_only", action="store_true", help="do not train; print the table of the file")
    settings = parser.parse_args(argv, argparse.Namespace(sets="development"))
    path = pathlib.Path(settings.json)
    records = json.loads(path.read_text()) if path.exists() else {}
    if not settings.table_only:
        train_missing(settings, records, path)
    print_table(records)


def train_missing(settings, records, path):
    """Add the missing runs to the records, and write the file after each."""
    normal = cifar10.read_normal(settings)
    minutes = [float(mark) for mark in settings.minutes.split(",")]
    for seed in map(int, settings.seeds.split(",")):
        for name, make_network in candidates().items():
            key = f"{name}, seed {seed}"
            if key in records:
                continue
            say(key)
            records[key] = {"network": name, "seed": seed} | measure(
                normal, make_network, seed, minutes
            )
            files.write_json(path, records)


if __name__ == "__main__":
    main()
