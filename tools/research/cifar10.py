"""Shared code of the experiments with CIFAR-10 as the normal images, from data sets to records.

The folder `--data_dir` holds prepared TFDS data sets. Among the default ones, `dtd32` and `gtsrb32`
(textures and traffic signs at 32 px) and `imagenet_aux` (a 32 px ImageNet subset with the splits
train and validation) are not public; prepare your own. The file `--auxiliary_exclude` lists classes
of the auxiliary set that CIFAR-10 has too; they are left out.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import NamedTuple

import keras
import numpy as np

import sddns_tf
from sddns_tf import data, files, metrics, schedules, sensitivity
from sddns_tf.cli import sources
from sddns_tf.validation import check_int

SIDE = 32
EPOCHS = 4  # entries in the log of a run
PATHS = ("data_dir", "auxiliary_exclude", "output_dir")  # not recorded as settings of a run


class Normal(NamedTuple):
    """CIFAR-10's images, uint8 `(N, 32, 32, 3)`."""

    training: np.ndarray
    calibration: np.ndarray
    fresh: np.ndarray


def parser(description):
    """Return a parser with the arguments that all experiments take."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR")
    add("--in_distribution", default="cifar10", help="TFDS data set of normal images")
    add("--ood", default="cifar100,dtd32,gtsrb32,mnist", help="TFDS data sets, separated by commas")
    add("--auxiliary", default="imagenet_aux", help="TFDS data set; its validation split is OOD")
    add("--auxiliary_exclude", metavar="FILE", help="names of auxiliary classes to leave out")
    add("--seed", type=int, default=0, help="seed of weights, order, views and negatives")
    add("--minutes", type=float, default=7.0, help="training time, approximately")
    add("--steps", type=int, help="training steps, instead of minutes")
    add("--output_dir", default="results", help="folder to write results to")
    add("--network", default="convolutional", choices=["convolutional", "convnet", "vit"])
    add("--width", type=int, default=64, help="channels of the first stage, or width of a vit")
    add("--learning_rate", type=float, default=2e-3, help="largest learning rate")
    add("--batch_size", type=int, default=96, help="images per step")
    add("--bank_images", type=int, default=10_000, help="training images in the bank")
    add("--ood_images", type=int, default=2_000, help="largest number of images per OOD set")
    return found


# --- Images -------------------------------------------------------------------------------------


def read(settings, name, split, exclude=()):
    """Return images of a TFDS data set at the size of CIFAR-10."""
    return data.load_arrays(
        f"tfds:{name}",
        split=split,
        data_dir=settings.data_dir,
        image_size=SIDE,
        exclude_labels=exclude,
    )


def read_held_out(settings):
    """Split the first 5,000 test images alternately into calibration and fresh images."""
    test = read(settings, settings.in_distribution, "test")[:5000]
    return test[::2], test[1::2]


def read_normal(settings):
    """Return all training images and the held-out ones."""
    return Normal(read(settings, settings.in_distribution, "train"), *read_held_out(settings))


def read_ood(settings):
    """Return the images of each OOD set by name."""
    names = settings.ood.split(",")
    ood = {name: read(settings, name, "test")[: settings.ood_images] for name in names}
    excluded = excluded_classes(settings)
    ood[settings.auxiliary] = read(settings, settings.auxiliary, "validation", excluded)
    noise = np.random.default_rng(0).integers(0, 256, (1000, SIDE, SIDE, 3)).astype(np.uint8)
    return {**ood, "noise": noise[: settings.ood_images]}


def excluded_classes(settings):
    """Return the names of auxiliary classes to leave out."""
    name = settings.auxiliary_exclude
    return sources.read_class_names(name) if name else []


def training_batches(settings, images, auxiliary=None):
    """Return endless batches of images, with auxiliary images if they are given."""
    options = {"batch_size": settings.batch_size, "shuffle": True, "drop_remainder": True}
    batches = data.load(images, seed=settings.seed, **options)
    if auxiliary is not None:
        auxiliary = data.load(auxiliary, seed=settings.seed + 1, **options)
        batches = data.with_auxiliary(batches, auxiliary)
    return batches.repeat()


# --- Training -----------------------------------------------------------------------------------


def backbone(settings):
    """Return the network of a run with new weights."""
    width = settings.width
    if settings.network == "convnet":
        return sddns_tf.ConvNet((width, 2 * width, 4 * width))
    if settings.network == "vit":
        return sddns_tf.VisionTransformer(
            SIDE, patch_size=4, hidden_dim=width, depth=4, num_heads=width // 32
        )
    return depthwise(width)


def depthwise(width):
    """Return four blocks of depthwise convolution and dense layers, pooled by mean and spread.

    The records in docs/results and the detector `cifar10-small` have this network.
    """
    layers = keras.layers
    images = keras.Input((None, None, 3))
    x = layers.Conv2D(width, 4, strides=2, padding="same")(images)
    for block, channels in enumerate((width, width, 2 * width, 2 * width)):
        if block == 2:
            x = layers.LayerNormalization(epsilon=1e-6)(x)
            x = layers.Conv2D(channels, 2, strides=2)(x)
        y = layers.DepthwiseConv2D(5, padding="same")(x)
        y = layers.LayerNormalization(epsilon=1e-6)(y)
        y = layers.Dense(2 * channels, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(channels)(y)])
    spread = keras.ops.sqrt(keras.ops.var(x, axis=(1, 2)) + 1e-4)
    features = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), spread])
    return keras.Model(images, features)


def optimizer(settings, steps):
    """Return AdamW with a warm-up over a tenth of the steps and a cosine schedule."""
    learning_rate = schedules.WarmupCosine(
        settings.learning_rate, 1e-5, steps, warmup_steps=steps // 10
    )
    return keras.optimizers.AdamW(learning_rate, weight_decay=0.04)


def fit(settings, make_model, batches, callbacks=()):
    """Train a model for a number of minutes or steps.

    Args:
        settings: Parsed arguments of `parser`.
        make_model: Function from a number of steps to the compiled model.
        batches: Endless dataset.
        callbacks: Keras callbacks.

    Returns:
        The model, and a dictionary about its training for the record.
    """
    if settings.steps:
        check_int("steps", settings.steps, low=EPOCHS)
    keras.utils.set_random_seed(settings.seed)
    steps = settings.steps or max(
        EPOCHS, int(60 * settings.minutes / seconds_per_step(make_model(1000), batches))
    )
    keras.utils.set_random_seed(settings.seed)
    model = make_model(steps)
    start = time.perf_counter()
    history = model.fit(
        batches,
        steps_per_epoch=steps // EPOCHS,
        epochs=EPOCHS,
        callbacks=list(callbacks),
        shuffle=False,  # the data set is shuffled already
        verbose=2,
    ).history
    steps = int(model.optimizer.iterations)
    return model, {
        "steps": steps,
        "images": steps * settings.batch_size,
        "seconds": time.perf_counter() - start,
        "history": {key: [float(x) for x in values] for key, values in history.items()},
    }


def seconds_per_step(model, batches):
    """Return the time of a step, measured on a throw-away model, to turn minutes into steps."""
    times = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    model.fit(batches, steps_per_epoch=23, callbacks=[clock], verbose=0)
    return float(np.median(np.diff(times[2:])))


# --- Measurements -------------------------------------------------------------------------------


def detector_of(settings, network, normal):
    """Return the detector of a run, made from `network`."""
    return sddns_tf.Detector.from_images(
        network,
        bank_images=normal.training[: settings.bank_images],
        calibration_images=normal.calibration,
        image_size=SIDE,
        verbose=0,
    )


def evaluate(detector, fresh, ood, trained_on=None):
    """Return AUROC, FPR at 95 % and share flagged for each OOD set, and the sensitivities."""
    normal = detector.predict(fresh, verbose=0)
    table = {}
    for name, images in ood.items():
        other = detector.predict(images, verbose=0)
        row = metrics.ood_metrics(normal["ood_score"], other["ood_score"])
        table[name] = {**row, "flagged": float(np.mean(other["is_ood"]))}
    return {
        "ood": table,
        "sensitivity": sensitivity.sensitivity(detector, fresh[:1000], trained_on=trained_on),
        "fresh_flagged": float(np.mean(normal["is_ood"])),
    }


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
