"""Solar cells: real photographs of sound and broken ones, and how well the broken ones are found.

    pip install -e ".[inspection]"
    python examples/solar_cells.py

The data set elpv-dataset, a package on PyPI, holds 2,624 electroluminescence photographs of solar
cells, graded by experts: 1,508 show sound cells, 715 broken ones; the 401 in between are left out.
There are two types of cell, monocrystalline and polycrystalline. Of the sound cells of each type,
60 % are for training and the bank, 20 % for calibration, and 20 % are fresh; broken ones are only
tested.

Prints for each type, and for both types in one detector, how well each of `--networks` does:

- `brightness`: the mean of a photograph, nothing learned.
- `pixels`: the nearest training photograph at 64 px, nothing learned.
- `untrained`: the first layers of a small network with random weights. Each place of a photograph
  is compared with the same place of sound cells, which lie alike in all photographs.
- `frozen`: EfficientNet-lite0, trained on ImageNet and used as is. Each place of a photograph is
  compared with all places of sound cells.
- `aligned`: the same network, an earlier layer. Each place is compared with the same place only.
- `fine_tuned`: as `aligned`, and trained further on the cells by self-distillation with negatives.
- `scratch`: as `aligned`, with a small network that is trained on the cells alone in the same way.

The first five are the default and take four to five minutes on two free CPU cores; the other two
train, for two to four minutes each per type. The last five can say where: `--output_dir` gets a
report that shows the maps, plus a `.keras` and a `.tflite` file for each. `results.json` holds all
figures; what is in it is not run again. Results of other settings take another folder.

The detector of both types has one bank. It flags at most the promised share of sound cells on
average; calibrated for each type separately (`Detector.calibrated_on`), it promises that for each.
"""

from sddns_tf.cli import starting

starting.import_tensorflow()  # without its messages, with oneDNN

import functools
import json
import pathlib
import time
from typing import NamedTuple

import keras
import numpy as np
import scipy.stats
from absl import app, flags, logging

import sddns_tf
from sddns_tf import calibration as calibrations
from sddns_tf import files, image_ops, metrics, schedules
from sddns_tf.cli import convert_efficientnet_lite

FLAGS = flags.FLAGS
flags.DEFINE_list("types", "mono,poly,both", "Types of cell.")
flags.DEFINE_list(
    "networks", "brightness,pixels,untrained,frozen,aligned", "What to compare; see above."
)
flags.DEFINE_string("output_dir", "solar_output", "Folder to write to.")
flags.DEFINE_integer("split_seed", 0, "Seed of the split and of everything else that is random.")
flags.DEFINE_integer("smoothing", 3, "Places over which scores are averaged; 1: none.")
flags.DEFINE_integer("train_images", None, "Train on so many sound cells of a type, not on all.")
flags.DEFINE_integer("limit", None, "Read so many photographs of a kind, to try the script.")
flags.DEFINE_integer("steps", None, "Training steps, to try the script.", lower_bound=10)
flags.DEFINE_float("false_positive_rate", 0.05, "Largest share of sound cells to flag.", 0.0, 1.0)

TYPES = ("mono", "poly")
SIZE = 224
BATCH_SIZE = 32
BANK_SIZE = 10_000


class Cells(NamedTuple):
    """Photographs of a type of cell, uint8 `(N, 224, 224, 3)`."""

    train: np.ndarray
    calibration: np.ndarray
    fresh: np.ndarray
    broken: np.ndarray


@functools.cache
def read_cells(kind):
    """Return the split of the cells of a type, or of both."""
    import elpv_dataset.utils

    if kind == "both":
        parts = zip(*(read_cells(one) for one in TYPES), strict=True)
        return Cells(*map(np.concatenate, parts))
    photographs, grades, types = elpv_dataset.utils.load_dataset()

    def chosen(grade):
        found = photographs[(types == kind) & (grades == grade)][: FLAGS.limit, :, :, np.newaxis]
        parts = np.array_split(np.repeat(found, 3, axis=-1), max(1, len(found) // 100))
        resized = np.concatenate([image_ops.resize(part, SIZE, SIZE) for part in parts])
        return np.round(resized).astype(np.uint8)

    sound, broken = chosen(0.0), chosen(1.0)
    order = np.random.default_rng(FLAGS.split_seed).permutation(len(sound))
    train, calibration, fresh = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
    return Cells(sound[train[: FLAGS.train_images]], sound[calibration], sound[fresh], broken)


# --- Networks ----------------------------------------------------------------------------------


def pretrained_network():
    """Return EfficientNet-lite0 with ImageNet's weights, which are converted once."""
    weights = pathlib.Path(FLAGS.output_dir) / "lite0.weights.h5"
    if not weights.exists():
        convert_efficientnet_lite.convert(str(weights))
    return sddns_tf.backbones.efficientnet_lite0(str(weights))


def trained(network, images, views, steps, rate, **options):
    """Return the teacher of a self-distillation with negatives made of the images themselves."""
    steps = FLAGS.steps or steps
    model = sddns_tf.SelfDistillation(
        backbone=network,
        views=views,
        negatives=sddns_tf.Negatives("cut_paste", source="in_distribution"),
        head=sddns_tf.ProjectionHead(
            num_prototypes=512, hidden_dim=256, bottleneck_dim=64, norm_last_layer=False
        ),
        seed=FLAGS.split_seed,
        **options,
    )
    schedule = schedules.WarmupCosine(rate, 0.01 * rate, steps, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.04))
    batches = sddns_tf.data.load(images, batch_size=BATCH_SIZE, shuffle=True, drop_remainder=True)
    model.fit(
        batches.repeat(),
        steps_per_epoch=steps // 5,
        epochs=5,
        callbacks=[sddns_tf.callbacks.CollapseMonitor()],
        shuffle=False,  # the data set is shuffled already
        verbose=2,
    )
    return model.teacher_backbone


def fine_tuned(images):
    """Return the pretrained network, trained further for a few steps at a low rate."""
    network = pretrained_network()
    for layer in network.layers:
        # Statistics of a million photographs are better than those of some hundred.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    views = sddns_tf.MultiCrop(
        128, local_views=0, global_area=(0.3, 1.0), color_jitter=0.3, grayscale=0
    )
    return trained(
        network,
        images,
        views,
        steps=100,
        rate=1e-4,
        teacher_momentum=0.99,
        negative_weight=schedules.Linear(0.0, 0.5, end_step=40, start_step=10),
    )


def untrained(images):
    """Return a small network with random weights."""
    del images
    return sddns_tf.ConvNet(convolutions=2, activation="gelu")


def from_scratch(images):
    """Return a small network that has seen nothing but sound cells."""
    # Camera and light do not change, so views are nearly whole images without color jitter.
    views = sddns_tf.MultiCrop(
        64, local_views=2, global_area=(0.6, 1.0), color_jitter=0, grayscale=0
    )
    network = sddns_tf.ConvNet((16, 32, 64), convolutions=2, activation="gelu")
    return trained(network, images, views, steps=250, rate=2e-3)


# For each network: how to make it, the size at which it sees images, the layers compared, and
# whether each place is compared with the same place of other cells or with any.
NETWORKS = {
    "untrained": (untrained, 64, "stage_1", True),
    "frozen": (lambda images: pretrained_network(), SIZE, "block_10", False),
    "aligned": (lambda images: pretrained_network(), SIZE, "block_4", True),
    "fine_tuned": (fine_tuned, SIZE, "block_4", True),
    "scratch": (from_scratch, 128, "stage_2", True),
}


# --- Scores ------------------------------------------------------------------------------------


def brightness(cells):
    """Return scores of calibration, fresh and broken cells: how dark they are."""
    return [-images.mean(axis=(1, 2, 3)) for images in cells[1:]]


def pixels(cells):
    """Return scores likewise: the distance to the nearest training photograph."""

    def vectors(images):
        small = [image_ops.resize(part, 64, 64) for part in np.array_split(images, 10)]
        return np.concatenate(small)[..., 0].reshape(len(images), -1)

    bank = vectors(cells.train)
    return [
        np.array([np.square(bank - one).sum(axis=1).min() for one in vectors(images)])
        for images in cells[1:]
    ]


def detector_of(name, cells):
    """Return a detector with places of a network's inner maps."""
    make, size, layers, aligned = NETWORKS[name]
    return sddns_tf.Detector.from_images(
        make(cells.train),
        bank_images=cells.train,
        calibration_images=cells.calibration,
        false_positive_rate=FLAGS.false_positive_rate,
        image_size=size,
        layers=layers,
        aligned=aligned,
        bank_size=None if aligned else BANK_SIZE,
        # Damage is larger than a place, and the grain of a cell is not damage.
        smoothing=FLAGS.smoothing,
        seed=FLAGS.split_seed,
        verbose=0,
    )


def write(detector, name, kind, cells):
    """Write the report and the files of a detector, and return its scores."""
    folder = pathlib.Path(FLAGS.output_dir) / f"{kind}_{name}"
    folder.mkdir(exist_ok=True)
    evaluation = sddns_tf.evaluation.evaluate(
        detector, cells.fresh, {"broken": cells.broken}, verbose=0
    )
    sddns_tf.report.write(folder / "report.html", evaluation, detector, f"Solar cells: {kind}")
    detector.save(folder / "detector.keras")
    sddns_tf.export.tflite(
        detector,
        folder / "detector.tflite",
        representative_images=cells.train[:50],
        calibration_images=cells.calibration,
        bank_size=BANK_SIZE,
        batch_size=1,
        verbose=0,
    )
    return [
        detector.calibration_scores.numpy(),
        *(evaluation.answers[name]["ood_score"] for name in (sddns_tf.evaluation.FRESH, "broken")),
    ]


def row(calibration, fresh, broken):
    """Return the figures of one line of the table."""
    rank = calibrations.largest_flagged_rank(len(calibration), FLAGS.false_positive_rate)
    threshold = np.sort(calibration)[len(calibration) - rank]
    flagged = int(np.count_nonzero(fresh > threshold))
    interval = scipy.stats.binomtest(flagged, len(fresh)).proportion_ci(method="wilson")
    return {
        "auroc": float(metrics.ood_metrics(fresh, broken)["auroc"]),
        "fresh_flagged": flagged / len(fresh),
        "fresh_interval": [interval.low, interval.high],
        "broken_flagged": float(np.mean(broken > threshold)),
        "images": [len(calibration), len(fresh), len(broken)],
    }


def measured(name, kind):
    """Return the figures of a network on a type of cell, and of the types apart for both."""
    keras.utils.set_random_seed(FLAGS.split_seed)
    cells, start = read_cells(kind), time.process_time()
    if name not in NETWORKS:
        return {kind: row(*{"brightness": brightness, "pixels": pixels}[name](cells))}
    detector = detector_of(name, cells)
    seconds = round(time.process_time() - start)
    found = {kind: {**row(*write(detector, name, kind, cells)), "cpu_seconds": seconds}}
    for one in TYPES if kind == "both" else ():
        apart = read_cells(one)
        group = detector.calibrated_on(apart.calibration, verbose=0)
        scores = [
            detector.predict(images, verbose=0)["ood_score"]
            for images in (apart.fresh, apart.broken)
        ]
        found[f"both: {one}"] = row(detector.calibration_scores.numpy(), *scores)
        found[f"both: {one}, calibrated apart"] = row(group.calibration_scores.numpy(), *scores)
    return found


def print_table(results):
    """Print all figures in Markdown, and below them the shares for which nothing is promised."""
    print("| cells | network | AUROC | fresh sound cells flagged (95 %) | broken cells flagged |")
    print("|---|---|--:|--:|--:|")
    unpromised = []
    for name, by_kind in results.items():
        for kind, one in by_kind.items():
            if kind in ("both: mono", "both: poly"):
                unpromised.append(f"{name}, {kind[-4:]}: {one['fresh_flagged']:.1%}")
                continue
            low, high = one["fresh_interval"]
            print(
                f"| {kind} | {name} | {one['auroc']:.3f} | {one['fresh_flagged']:.1%} "
                f"({low:.1%} to {high:.1%}) | {one['broken_flagged']:.1%} |"
            )
    if unpromised:
        print(
            "Calibrated on both types, a detector promises a rate over both. Flagged of each type:"
        )
        print("; ".join(unpromised))


def check_same_settings(folder):
    """Return the settings, or raise a `UsageError` if a folder has results of others."""
    names = (
        "split_seed", "smoothing", "train_images", "limit", "steps", "false_positive_rate"
    )  # fmt: skip
    settings = {name: FLAGS[name].value for name in names}
    path = folder / "settings.json"
    known = json.loads(path.read_text()) if path.exists() else settings
    if known != settings:
        raise app.UsageError(
            f"--output_dir must be another folder than {folder}, which holds results of {known}. "
            f"Received: {settings}"
        )
    return settings


def main(argv):
    """Run what is missing, and print the table."""
    del argv
    logging.set_verbosity(logging.ERROR)
    known = ("brightness", "pixels", *NETWORKS)
    for flag, given, allowed in (
        ("types", FLAGS.types, (*TYPES, "both")),
        ("networks", FLAGS.networks, known),
    ):
        if not set(given) <= set(allowed):
            raise app.UsageError(f"--{flag} must be of {', '.join(allowed)}. Received: {given}")
    path = pathlib.Path(FLAGS.output_dir) / "results.json"
    settings = check_same_settings(path.parent)
    results = json.loads(path.read_text()) if path.exists() else {}
    for kind in FLAGS.types:
        for name in FLAGS.networks:
            if kind in results.get(name, {}):
                continue
            print(f"{kind}: {name} ...", flush=True)
            results.setdefault(name, {}).update(measured(name, kind))
            files.write_json(path, results)
            files.write_json(path.with_name("settings.json"), settings)
    print_table(results)
    print(f"Wrote reports and detectors to {path.parent.resolve()}")


if __name__ == "__main__":
    app.run(main)
