r"""Figures of docs/local.md: local detection on solar cells, on one development split.

    pip install -e ".[inspection]" scikit-image
    sddns convert-efficientnet-lite --output=lite0.weights.h5
    python -m tools.research.local_table --runs_dir=local --weights=lite0.weights.h5 --only=bank
    python -m tools.research.local_table --runs_dir=local --only=negatives,mono
    python -m tools.research.local_table --runs_dir=local --table_only

Of each type's sound cells, 60 % make the bank, 20 % calibrate and 20 % are fresh; the OOD set is
all defective cells. Each run writes `NAME.json` to `--runs_dir` and is skipped if that file exists.
At the end the tables of all runs are printed in Markdown. Experiments:

- `bank`: the number of rows in the bank, and of places kept from which the coreset chooses them,
  with EfficientNet-lite0 trained on ImageNet, 224 px, strides 8 and 16. Milliseconds are CPU time
  on one thread to score one image from its feature maps.
- `components`: the default bank, of all channels or of principal components: see
  `sddns_tf.components`. Milliseconds include their projection.
- `aligned`: each place compared with the same place only, by one layer of that network, scores
  smoothed over 3 x 3 places: which layer is best.
- `standardized`: the default bank without standardizing channels (`raw`).
- `tokens`: which block of a small vision transformer, trained on the cells, gives the maps.
- `negatives`: a small convolutional network, untrained or trained on the cells: without negatives,
  with rotated auxiliary images, or with pasted pieces of the cells themselves.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import sddns_tf
from sddns_tf import files, image_ops, metrics, schedules
from sddns_tf.backbones import efficientnet_lite0
from sddns_tf.bank import Reservoir, coreset
from sddns_tf.cli.console import say
from sddns_tf.features import FeatureExtractor, extract_features
from sddns_tf.local import Moments
from tools.benchmark import harness

FLAGS = argparse.Namespace()
TYPES = ("mono", "poly")
ROWS = (1_000, 5_000, 10_000)
KEPT = (10_000, 50_000, 100_000)
DEFAULT = (5_000, 100_000)
COMPONENTS = (152, 128, 96, 64, 32)  # 152 are all
LAYERS = tuple(f"block_{number}" for number in (1, 2, 4, 7, 10, 14))
NEGATIVES = ("untrained", "none", "auxiliary-rot90", "in_distribution-cut_paste")
BATCH_SIZE = 32
SIDE, DEPTH = 64, 4
IMAGENET_SIDE = 224
RUN = ("type", "setting", "seed")
# Columns of the tables, with their number of decimals. Not every experiment has all.
FIGURES = {
    "auroc": 3,
    "fresh_flagged": 3,
    "defective_flagged": 3,
    "whole_image_auroc": 3,
    "milliseconds": 1,
    "megabytes": 1,
}
UNRECORDED = ("runs_dir", "weights", "table_only")  # They say nothing of a run.


class Cells(NamedTuple):
    """Photographs of one type of cell, uint8 `(N, side, side, 3)`."""

    bank: np.ndarray
    calibration: np.ndarray
    fresh: np.ndarray
    defective: np.ndarray


def parser():
    """Return the arguments."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--runs_dir", required=True, help="folder of the runs' JSON files")
    add("--only", default="", help="parts, with commas between, that a run's name must all have")
    add("--seeds", default="0", help="seeds of trained networks, separated by commas")
    add("--train_steps", type=int, default=300, help="training steps of trained networks")
    add("--split_seed", type=int, default=0, help="seed of the split")
    add("--limit", type=int, help="use at most this many cells of each kind, to try it out")
    add("--weights", help="EfficientNet-lite0's weights, from `sddns convert-efficientnet-lite`")
    add("--table_only", action="store_true", help="only print the tables of finished runs")
    return found


@functools.lru_cache(maxsize=2)
def read_cells(kind, side):
    """Return the split of the cells of a type."""
    import elpv_dataset.utils

    images, probabilities, types = elpv_dataset.utils.load_dataset()

    def chosen(probability):
        found = images[(types == kind) & (probabilities == probability)][: FLAGS.limit]
        found = np.repeat(found[..., np.newaxis], 3, axis=-1)
        parts = np.array_split(found, max(1, len(found) // 100))
        return np.concatenate([np.round(image_ops.resize(x, side, side)) for x in parts])

    sound = chosen(0.0).astype(np.uint8)
    order = np.random.default_rng(FLAGS.split_seed).permutation(len(sound))
    parts = np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])
    return Cells(*(sound[part] for part in parts), chosen(1.0).astype(np.uint8))


def auxiliary_images(count=2_000):
    """Return crops of scikit-image's photographs, none of cells, uint8 `(count, 64, 64, 3)`."""
    import skimage.data

    rng = np.random.default_rng(0)
    photographs = [skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    crops = []
    for index in range(count):
        photograph = photographs[index % len(photographs)].mean(axis=-1)
        y, x = (rng.integers(0, side - SIDE) for side in photograph.shape)
        crops.append(photograph[y : y + SIDE, x : x + SIDE])
    return np.repeat(np.stack(crops)[..., np.newaxis], 3, axis=-1).astype(np.uint8)


# --- Networks ----------------------------------------------------------------------------------


def small_network():
    """Return a small network of plain convolutions, because damage is local and cells are few."""
    return sddns_tf.ConvNet((16, 32, 64), activation="gelu")


def small_transformer():
    """Return a vision transformer of four blocks, 8 x 8 tokens of 8 px."""
    return sddns_tf.VisionTransformer(
        SIDE, patch_size=8, hidden_dim=96, depth=DEPTH, num_heads=3, name="small_transformer"
    )


@functools.lru_cache(maxsize=1)
def trained(make_network, kind, negatives, seed):
    """Return the teacher of a self-distillation on the cells of the bank."""
    keras.utils.set_random_seed(seed)
    steps, (source, _, shift) = FLAGS.train_steps, negatives.partition("-")
    model = sddns_tf.SelfDistillation(
        backbone=make_network(),
        # The camera and lighting do not change: nearly whole images, and no color jitter.
        views=sddns_tf.MultiCrop(
            SIDE, local_views=2, global_area=(0.6, 1.0), color_jitter=0, grayscale=0
        ),
        negatives=sddns_tf.Negatives(shift, source) if shift else None,
        head=sddns_tf.ProjectionHead(512, hidden_dim=256, bottleneck_dim=64, norm_last_layer=False),
        seed=seed,
    )
    if negatives == "untrained":
        return model.teacher_backbone
    rate = schedules.WarmupCosine(2e-3, 1e-5, steps, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.04))

    def batches(images):
        options = {"batch_size": BATCH_SIZE, "shuffle": True, "drop_remainder": True}
        return sddns_tf.data.load(images, seed=seed, **options)

    data = batches(read_cells(kind, SIDE).bank).repeat()
    if model.negatives is not None and model.negatives.needs_auxiliary:
        data = sddns_tf.data.with_auxiliary(data, batches(auxiliary_images()))
    model.fit(data, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0)
    return model.teacher_backbone


# --- Measuring ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def maps_of(make_network, kind, layers, side):
    """Return an extractor and its maps of all cells of a type, as the layers give them."""
    cells = read_cells(kind, side)
    extractor = FeatureExtractor(make_network(), side, side, layers=layers)
    maps = [extract_features(extractor, images, batch_size=32, verbose=0) for images in cells]
    return extractor, Cells(*maps)


def measured(extractor, maps, rows, kept, standardized=True, components=None):
    """Return the measurements of a local detector with `rows` rows chosen from `kept` places."""
    moments, reservoir = Moments(extractor.feature_dim), Reservoir(kept, seed=0)
    for image in maps.bank:
        places = image.reshape(-1, image.shape[-1])
        moments.add(places)
        reservoir.offer(places)
    mean, deviation = np.zeros(1, np.float32), np.ones(1, np.float32)
    if standardized:
        mean, deviation = (x.astype("float32") for x in (moments.mean, moments.deviation))
    places = (reservoir.rows - mean) / deviation
    extractor = FeatureExtractor(
        extractor.backbone,
        extractor.image_size,
        layers=extractor.layer_names,
        components=components,
    )
    reduced = extractor.principal or tf.identity
    if extractor.principal:
        extractor.principal.assign(places)
    bank = reduced(coreset(places, rows, seed=0)).numpy()
    calibration = (maps.calibration - mean) / deviation
    detector = sddns_tf.Detector.from_features(extractor, bank, reduced(calibration).numpy())
    answer = tf.function(lambda raw: detector.answer(reduced((raw - mean) / deviation)))
    answers = [[answer(raw[i : i + 1]) for i in range(len(raw))] for raw in maps[2:]]
    scores, flagged = (
        [np.concatenate([one[name] for one in each]) for each in answers]
        for name in ("ood_score", "is_ood")
    )
    score = tf.function(lambda one: detector.scores(reduced(one))["anomaly_map"])
    return {
        "auroc": float(metrics.ood_metrics(*scores)["auroc"]),
        "fresh_flagged": float(flagged[0].mean()),
        "defective_flagged": float(flagged[1].mean()),
        "milliseconds": milliseconds(lambda: score(tf.constant(calibration[:1]))),
        "megabytes": bank.nbytes / 1e6,
        "map_size": extractor.map_size,
        "channels": extractor.feature_dim,
        "images": [len(images) for images in maps],
    }


def measured_aligned(kind, layer):
    """Return the measurements of an aligned detector of one layer."""
    cells = read_cells(kind, IMAGENET_SIDE)
    detector = sddns_tf.Detector.from_images(
        imagenet_network(),
        cells.bank,
        cells.calibration,
        image_size=IMAGENET_SIDE,
        layers=layer,
        aligned=True,
        smoothing=3,
        verbose=0,
    )
    answers = [detector.predict(images, verbose=0) for images in cells[2:]]
    return {
        "auroc": float(metrics.ood_metrics(*(one["ood_score"] for one in answers))["auroc"]),
        "fresh_flagged": float(answers[0]["is_ood"].mean()),
        "defective_flagged": float(answers[1]["is_ood"].mean()),
        "map_size": detector.extractor.map_size,
        "channels": detector.extractor.feature_dim,
        "images": [len(images) for images in cells],
    }


def milliseconds(function, calls=15):
    """Return the median CPU time of a call, which other work hardly changes."""
    function()
    times = []
    for _ in range(calls):
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def imagenet_network():
    """Return EfficientNet-lite0, with the weights that the options name."""
    return efficientnet_lite0(FLAGS.weights)


def run(experiment, kind, setting, seed):
    """Return the measurements of one run."""
    if experiment == "aligned":
        return measured_aligned(kind, setting)
    if experiment in ("bank", "components", "standardized"):
        found = maps_of(imagenet_network, kind, "auto", IMAGENET_SIDE)
        if experiment == "bank":
            return measured(*found, *map(int, setting.split("of")))
        if experiment == "components":
            return measured(*found, *DEFAULT, components=setting if setting < 152 else None)
        return measured(*found, *DEFAULT, setting == "standardized")
    network, layers = small_transformer, setting
    if experiment == "negatives":
        network, layers = small_network, ("stage_2", "stage_3")
    network = trained(network, kind, "none" if experiment == "tokens" else setting, seed)
    cells = read_cells(kind, SIDE)
    whole = sddns_tf.Detector.from_images(
        network, cells.bank, cells.calibration, image_size=SIDE, k=5, verbose=0
    )
    scores = [whole.predict(x, verbose=0)["ood_score"] for x in (cells.fresh, cells.defective)]
    found = measured(*maps_of(lambda: network, kind, layers, SIDE), *DEFAULT)
    return {**found, "whole_image_auroc": float(metrics.ood_metrics(*scores)["auroc"])}


def runs():
    """Yield experiment, type, setting and seed of every run, those of the default bank first."""
    seeds = [int(seed) for seed in FLAGS.seeds.split(",")]
    banks = [(r, kept) for r in ROWS for kept in KEPT]
    banks.sort(key=lambda bank: bank != DEFAULT)
    for kind in TYPES:
        yield from (("bank", kind, f"{r}of{kept}", 0) for r, kept in banks)
        yield from (("components", kind, number, 0) for number in COMPONENTS)
        yield from (("aligned", kind, layer, 0) for layer in LAYERS)
        yield "standardized", kind, "raw", 0
    for seed in seeds:
        for kind in TYPES:
            yield from (("negatives", kind, setting, seed) for setting in NEGATIVES)
            yield from (("tokens", kind, f"blocks_{i}", seed) for i in range(DEPTH))


def print_tables(results):
    """Print a table of each experiment in Markdown."""
    for experiment in ("bank", "components", "aligned", "standardized", "tokens", "negatives"):
        found = [result for result in results if result["experiment"] == experiment]
        if not found:
            continue
        print(f"\n{experiment}\n\n| type | setting | seed | AUROC | fresh flagged |", end="")
        print(" defective flagged | whole image AUROC | ms | MB |\n|---|---|" + "--:|" * 7)
        for one in found:
            figures = [
                f"{one[name]:.{digits}f}" if name in one else "" for name, digits in FIGURES.items()
            ]
            print("|", " | ".join([*(str(one[key]) for key in RUN), *figures]), "|")


def main(argv=None):
    """Make the runs that are missing, then print the tables of all."""
    vars(FLAGS).clear()  # Otherwise options of an earlier call would override the defaults.
    parser().parse_args(argv, FLAGS)
    harness.pin_threads(1)
    only = [part for part in FLAGS.only.split(",") if part]
    runs_dir = pathlib.Path(FLAGS.runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    for parts in runs():
        name = "-".join(map(str, parts))
        path = runs_dir / f"{name}.json"
        if FLAGS.table_only or path.exists() or not all(part in name for part in only):
            continue
        start = time.perf_counter()
        result = run(*parts)
        named = dict(zip(("experiment", "type", "setting", "seed"), parts, strict=True))
        flags = {key: value for key, value in vars(FLAGS).items() if key not in UNRECORDED}
        files.write_json(path, {**named, **result, "flags": flags})
        say(f"{name}: AUROC {result['auroc']:.3f}, {time.perf_counter() - start:.0f} s")
    print_tables([json.loads(path.read_text()) for path in sorted(runs_dir.glob("*.json"))])


if __name__ == "__main__":
    main()
