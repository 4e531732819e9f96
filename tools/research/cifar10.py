"""Shared code of the experiments with CIFAR-10 as the normal images, from data sets to records.

The folder `--data_dir` holds prepared TFDS data sets. Among the default ones, `dtd32` and `gtsrb32`
(textures and traffic signs at 32 px) and `imagenet_aux` (a 32 px ImageNet subset with the splits
train and validation) are not public; prepare your own. The file `--auxiliary_exclude` lists classes
of the auxiliary set that CIFAR-10 has too; they are left out.

All choices are made on `--sets=development`: noise, blurred and gray CIFAR-10, and half of
the auxiliary validation images. `--sets=test` are other data sets, the other half, and fresh
CIFAR-10 images that development does not use: see docs/results/protocol.md.
"""

import argparse
import csv
import json
import pathlib
import sys
import time
from typing import NamedTuple

import keras
import numpy as np
from scipy.ndimage import gaussian_filter

import sddns_tf
from sddns_tf import data, features, files, metrics, schedules, sensitivity
from sddns_tf.callbacks import training_state
from sddns_tf.cli import sources
from sddns_tf.validation import check_int
from tools.research import networks

SIDE = 32
EPOCHS = 4  # entries in the log of a run
CHECKPOINT_STEPS = 100
# From the width, `--width`.
NETWORKS = {
    "default": lambda width: sddns_tf.ConvNet((width, 2 * width, 4 * width)),
    "convolutional": networks.depthwise,
    # As in the small scale of the protocol.
    "convnet": lambda width: sddns_tf.ConvNet(
        (width, 2 * width, 4 * width), convolutions=2, activation="gelu"
    ),
    "vit": lambda width: networks.vit(SIDE, width),
}
PATHS = ("data_dir", "auxiliary_exclude", "output_dir")  # not recorded as settings of a run


class Normal(NamedTuple):
    """CIFAR-10's images, uint8 `(N, 32, 32, 3)`, and labels for the k-NN accuracy."""

    training: np.ndarray
    calibration: np.ndarray
    fresh: np.ndarray
    training_labels: np.ndarray | None = None
    fresh_labels: np.ndarray | None = None


def parser(description):
    """Return a parser with the arguments that all experiments take."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR")
    add("--in_distribution", default="cifar10", help="TFDS data set of normal images")
    add("--ood", default="cifar100,dtd32,gtsrb32,mnist", help="TFDS data sets, separated by commas")
    add("--auxiliary", default="imagenet_aux", help="TFDS data set with train and validation")
    add("--auxiliary_exclude", metavar="FILE", help="names of auxiliary classes to leave out")
    add("--seed", type=int, default=0, help="seed of weights, order, views and negatives")
    add("--steps", type=int, default=2400, help="training steps, a multiple of 4")
    add("--sets", default="development", choices=["development", "test"], help="sets to measure on")
    add("--output_dir", default="results", help="folder to write results to")
    add("--network", default="default", choices=list(NETWORKS))
    add("--width", type=int, default=32, help="channels of the first stage, or width of a vit")
    add("--learning_rate", type=float, default=2e-3, help="largest learning rate")
    add("--batch_size", type=int, default=128, help="images per step")
    add("--bank_images", type=int, default=10_000, help="training images in the bank")
    add("--ood_images", type=int, default=2_000, help="largest number of images per OOD set")
    return found


# --- Images -------------------------------------------------------------------------------------


def read(settings, name, split, exclude=(), with_labels=False):
    """Return images of a TFDS data set at the size of CIFAR-10."""
    return data.load_arrays(
        f"tfds:{name}",
        split=split,
        data_dir=settings.data_dir,
        image_size=SIDE,
        exclude_labels=exclude,
        with_labels=with_labels,
    )


def read_held_out(settings):
    """Split the first half of the test images alternately into calibration and fresh images."""
    test = read(settings, settings.in_distribution, "test")
    return test[: len(test) // 2 : 2], test[1 : len(test) // 2 : 2]


def read_normal(settings):
    """Return the images; with `--sets=test`, the fresh ones are the second half of the split."""
    training, training_labels = read(settings, settings.in_distribution, "train", with_labels=True)
    test, labels = read(settings, settings.in_distribution, "test", with_labels=True)
    half = len(test) // 2
    fresh = slice(half, None) if settings.sets == "test" else slice(1, half, 2)
    return Normal(training, test[:half:2], test[fresh], training_labels, labels[fresh])


def read_ood(settings, normal):
    """Return the images of each set of `--sets` by name."""
    excluded = excluded_classes(settings)
    auxiliary = read(settings, settings.auxiliary, "validation", excluded)
    if settings.sets == "test":
        names = settings.ood.split(",")
        ood = {name: read(settings, name, "test")[: settings.ood_images] for name in names}
        return {**ood, settings.auxiliary: auxiliary[1::2]}
    fresh = normal.fresh[: settings.ood_images].astype(np.float32)
    gray = np.repeat(fresh @ np.float32([[0.299], [0.587], [0.114]]), 3, axis=-1)
    blurred = gaussian_filter(fresh, (0, 2, 2, 0))
    noise = np.random.default_rng(0).integers(0, 256, (1000, SIDE, SIDE, 3))
    made = {"noise": noise[: settings.ood_images], "blurred": blurred, "gray": gray}
    ood = {name: np.round(images).astype(np.uint8) for name, images in made.items()}
    return {**ood, settings.auxiliary: auxiliary[::2]}


def excluded_classes(settings):
    """Return the names of auxiliary classes to leave out."""
    name = settings.auxiliary_exclude
    return sources.read_class_names(name) if name else []


def training_batches(settings, images, auxiliary=None, first_batch=0):
    """Return endless batches of images, with auxiliary images if they are given."""
    options = {"batch_size": settings.batch_size, "shuffle": True, "first_batch": first_batch}
    batches = data.load(images, seed=settings.seed, **options)
    if auxiliary is not None:
        auxiliary = data.load(auxiliary, seed=settings.seed + 1, **options)
        batches = data.with_auxiliary(batches, auxiliary)
    return batches


# --- Training -----------------------------------------------------------------------------------


def backbone(settings):
    """Return the network of a run with new weights."""
    return NETWORKS[settings.network](settings.width)


def optimizer(settings, steps):
    """Return AdamW with a warm-up over a tenth of the steps and a cosine schedule."""
    learning_rate = schedules.WarmupCosine(
        settings.learning_rate, 1e-5, steps, warmup_steps=steps // 10
    )
    return keras.optimizers.AdamW(learning_rate, weight_decay=0.04)


def fit(settings, name, make_model, batches_from, callbacks=(), resume=True):
    """Train a model for `--steps`, continuing where an earlier run of that name was stopped.

    Args:
        settings: Parsed arguments of `parser`.
        name: Name of the run. `NAME.csv`, the log, and `NAME-state/` are written beside its record.
        make_model: Function without arguments that returns the compiled model.
        batches_from: Function from the number of the first batch to an endless dataset.
        callbacks: Keras callbacks.
        resume: Whether to save states to resume from. Needs a `SelfDistillation`.

    Returns:
        The model, and a dictionary about its training for the record.
    """
    check_int("steps", settings.steps, low=EPOCHS)
    folder = pathlib.Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.csv"
    keras.utils.set_random_seed(settings.seed)
    model, step, callbacks = make_model(), 0, list(callbacks)
    if resume:
        state = folder / f"{name}-state"
        check_same_flags(settings, state)
        checkpoint = sddns_tf.callbacks.Checkpoint(state, CHECKPOINT_STEPS)
        step = checkpoint.restore(model)
        callbacks.append(checkpoint)
    if not step:
        log.unlink(missing_ok=True)
    callbacks.append(keras.callbacks.CSVLogger(log, append=True))
    start = time.perf_counter()
    parts = training_state.parts_left(step, settings.steps // EPOCHS, EPOCHS)
    for first_batch, part in parts:
        batches = batches_from(first_batch)  # shuffled already
        model.fit(batches, callbacks=callbacks, shuffle=False, verbose=2, **part)
    steps = int(model.optimizer.iterations)
    return model, {
        "steps": steps,
        "images": steps * settings.batch_size,
        "seconds": time.perf_counter() - start,
        "resumed_at": step,
        "history": read_log(log),
    }


def check_same_flags(settings, state):
    """Note the flags of a run beside its state; raise a `ValueError` if it is of other flags."""
    flags = {name: value for name, value in flags_of(settings).items() if name != "sets"}
    flags = json.loads(json.dumps(flags))  # Which has no tuples.
    path = state / "flags.json"
    known = json.loads(path.read_text()) if path.exists() else flags
    if known != flags:
        names = [name for name in {**known, **flags} if known.get(name) != flags.get(name)]
        ours, theirs = ({name: one.get(name) for name in names} for one in (flags, known))
        raise ValueError(
            f"{state} must be of a run with the same flags: remove it, or choose another "
            f"--output_dir or --name. Received: {ours}, not {theirs}"
        )
    files.write_json(path, flags)


def read_log(path):
    """Return the columns of a Keras log, which has NA where there was no validation."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [key for key, value in rows[0].items() if key != "epoch" and value != "NA"]
    return {key: [float(row[key]) for row in rows] for key in columns}


# --- Measurements -------------------------------------------------------------------------------


def detector_of(settings, network, normal, standardize=False):
    """Return the detector of a run, made from `network`."""
    return sddns_tf.Detector.from_images(
        network,
        bank_images=normal.training[: settings.bank_images],
        calibration_images=normal.calibration,
        image_size=SIDE,
        standardize=standardize,
        verbose=0,
    )


def evaluate(detector, normal, ood, features_of, trained_on=None):
    """Return the measurements of a detector.

    Args:
        detector: `Detector`, or anything with its `predict`.
        normal: `Normal`.
        ood: Images of each set by name.
        features_of: Function from images to features `(N, D)`.
        trained_on: Shift of the negatives, or None.

    Returns:
        Dictionary: AUROC, FPR at 95 % and share flagged for each set, the sensitivities, the share
        of fresh images flagged, and the accuracy of the 20 nearest images of the bank.
    """
    fresh = detector.predict(normal.fresh, verbose=0)
    table = {}
    for name, images in ood.items():
        other = detector.predict(images, verbose=0)
        row = metrics.ood_metrics(fresh["ood_score"], other["ood_score"])
        table[name] = {**row, "flagged": float(np.mean(other["is_ood"]))}
    return {
        "ood": table,
        "sensitivity": sensitivity.sensitivity(
            detector, normal.fresh[:1000], trained_on=trained_on
        ),
        "fresh_flagged": float(np.mean(fresh["is_ood"])),
        "knn": nearest_neighbor_accuracy(normal, features_of),
    }


def nearest_neighbor_accuracy(normal, features_of, bank_images=10_000):
    """Return how often the 20 nearest training images predict the class of a fresh one."""
    bank = normal.training[:bank_images]
    return metrics.knn_accuracy(
        features_of(bank),
        normal.training_labels[: len(bank)],
        features_of(normal.fresh),
        normal.fresh_labels,
    )


def features_with(extractor):
    """Return a function from images to the features of an extractor."""
    return lambda images: features.extract_features(extractor, images, verbose=0)


def record_run(settings, name, measure):
    """Write `NAME.json`, unless it exists.

    Args:
        settings: Parsed arguments of `parser`.
        name: Name of the file.
        measure: Function without arguments that trains and returns the record.
    """
    target = pathlib.Path(settings.output_dir) / f"{name}.json"
    if target.exists():
        print(f"Skipped: {target} exists", file=sys.stderr)
        return
    record = measure()
    files.write_json(target, record)
    aurocs = {key: round(row["auroc"], 3) for key, row in record["ood"].items()}
    mean = float(np.mean(list(aurocs.values())))
    print(json.dumps({"name": name, "steps": record["steps"], "mean": mean, **aurocs}))


def flags_of(settings):
    """Return the settings of a run for its record."""
    return {name: value for name, value in vars(settings).items() if name not in PATHS}
