r"""Check that `SelfDistillation` trains with its defaults on different networks and data.

    python -m tools.research.defaults_table --data_dir=TFDS --runs_dir=defaults
    python -m tools.research.defaults_table --runs_dir=defaults --only=cifar10,plain,none
    python -m tools.research.defaults_table --runs_dir=defaults --table_only

Trains every combination of data, backbone, negatives, settings and seed for 400 steps of 64 images
with `keras.optimizers.AdamW(1e-3)` (`--learning_rate` takes another) and two global views. Nothing
else is set: the settings `default` use the constructor's defaults, `paper` the paper's constants.
Each run writes `NAME.json`, and is skipped if that file exists. At the end a Markdown table of all
runs is printed: k-NN accuracy (CIFAR-10) or mean AUROC (other data) of the trained network and of
the untrained one (with standardized features or as they are, whichever is better for it), and the
positive loss and the entropy of the teacher's targets relative to ln K. Outputs count as uniform if
either is above 0.995.

`cifar10` needs prepared TFDS data sets (`cifar10`, and `--auxiliary` for auxiliary images),
`textures` needs scikit-image, and `cells` needs the package `elpv-dataset`: 300 photographs of
intact solar cells at 64 px, with defective ones as OOD. Negatives of cells are made from crops of
scikit-image's photographs, like those of textures.
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
import time

from sddns_tf import files
from sddns_tf.cli.console import say

FLAGS = argparse.Namespace()
DATA = ("cifar10", "textures", "cells")
BACKBONES = ("plain", "depthwise", "resnet", "mobilenet_v3", "vit", "vit_tiny")
NEGATIVES = ("none", "auxiliary-rot90", "in_distribution-perm4")
SETTINGS = ("default", "paper")
# Entropies and losses above this share of ln K count as those of uniform outputs.
UNIFORM = 0.995


def parser():
    """Return the arguments."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--data_dir", help="folder of prepared TFDS data sets; default: $TFDS_DATA_DIR")
    add("--auxiliary", default="tfds:imagenet_resized/32x32", help="auxiliary images for CIFAR-10")
    add("--runs_dir", required=True, help="folder for the JSON files of the runs")
    add("--only", default="", help="run only runs with all these parts in their name")
    add("--seeds", default="0,1", help="seeds, separated by commas")
    add("--train_steps", type=int, default=400, help="training steps of each run")
    add("--batch_size", type=int, default=64, help="images per step")
    add("--learning_rate", type=float, default=1e-3, help="that of AdamW, in every step")
    add("--table_only", action="store_true", help="do not train; print the table of existing runs")
    return found


def read_data(name):
    """Return training, bank, test and auxiliary images, and labels or OOD sets for the test."""
    import numpy as np

    generator = np.random.default_rng(0)
    if name == "cifar10":
        return read_cifar10()
    sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
    import quickstart

    textures = quickstart.make_data(generator)
    if name == "textures":
        return {
            "training": textures["training"],
            "bank": textures["training"][:5_000],
            "test": textures["test"],
            "auxiliary": textures["auxiliary"],
            "ood": textures["ood"],
        }
    cells, defective = read_cells(64)
    order = generator.permutation(len(cells))
    return {
        "training": cells[order[:300]],
        "bank": cells[order[:300]],
        "test": cells[order[300:900]],
        "auxiliary": textures["auxiliary"],
        "ood": {"defective": defective},
    }


def read_cifar10():
    """Return CIFAR-10 with labels, and auxiliary images including classes of CIFAR-10."""
    import os

    from sddns_tf import data

    data_dir = FLAGS.data_dir or os.environ.get("TFDS_DATA_DIR")

    def read(source, split, count, labels=True):
        return data.load_arrays(
            source, split=split, data_dir=data_dir, limit=count, with_labels=labels
        )

    training, labels = read("tfds:cifar10", "train", 25_600)
    test, test_labels = read("tfds:cifar10", "test", 2_000)
    return {
        "training": training,
        "bank": training[:5_000],
        "bank_labels": labels[:5_000],
        "test": test,
        "test_labels": test_labels,
        "auxiliary": read(FLAGS.auxiliary, "train", 18_000, labels=False),
    }


def read_cells(size):
    """Return intact and defective solar cells, uint8 `(N, size, size, 3)`."""
    import elpv_dataset.utils
    import numpy as np

    from sddns_tf import image_ops

    images, probabilities, _ = elpv_dataset.utils.load_dataset()

    def resized(images):
        images = np.repeat(images[..., np.newaxis], 3, axis=-1)
        return np.round(image_ops.resize(images, size, size)).astype(np.uint8)

    return resized(images[probabilities == 0]), resized(images[probabilities == 1])


def make_model(data, backbone, negatives, settings, seed):
    """Return a compiled `SelfDistillation`; everything not in the run's name is a default."""
    import keras

    import sddns_tf
    from tools.research import networks

    keras.utils.set_random_seed(seed)
    size = data["training"].shape[1]
    source, _, shift = negatives.partition("-")
    constants = {}
    if settings == "paper":
        constants = {"head": sddns_tf.ProjectionHead(), **sddns_tf.SelfDistillation.PAPER}
    model = sddns_tf.SelfDistillation(
        backbone=networks.BY_NAME[backbone](size),
        views=sddns_tf.MultiCrop(size, local_views=0),
        negatives=None if negatives == "none" else sddns_tf.Negatives(shift, source),
        seed=seed,
        **constants,
    )
    model.compile(keras.optimizers.AdamW(FLAGS.learning_rate))
    return model


def make_batches(data, model, seed):
    """Return endless training batches, with auxiliary images if the model needs them."""
    import sddns_tf

    def load(images):
        return sddns_tf.data.load(
            images, batch_size=FLAGS.batch_size, shuffle=True, seed=seed, drop_remainder=True
        )

    batches = load(data["training"]).repeat()
    if model.negatives is not None and model.negatives.needs_auxiliary:
        batches = sddns_tf.data.with_auxiliary(batches, load(data["auxiliary"]))
    return batches


def quality(model, data):
    """Return k-NN accuracy if there are labels, else mean AUROC over the OOD sets.

    Dict of the quality of the features `raw`, as they are, and `standardized` by the bank.
    """
    import numpy as np

    from sddns_tf import building, metrics

    def features(images):
        return model.predict(images, batch_size=256, verbose=0)

    bank, normal = features(data["bank"]), features(data["test"])
    if "ood" not in data:
        mean, deviation = building.moments_of(bank)
        sides = {
            "raw": (bank, normal),
            "standardized": [(x - mean) / deviation for x in (bank, normal)],
        }
        return {
            name: metrics.knn_accuracy(known, data["bank_labels"], tested, data["test_labels"])
            for name, (known, tested) in sides.items()
        }
    others = [normal, *(features(images) for images in data["ood"].values())]
    found = {}
    for name in ("raw", "standardized"):
        fresh, *scores = building.scores_against(bank, others, standardize=name == "standardized")
        aurocs = [metrics.ood_metrics(fresh, ood)["auroc"] for ood in scores]
        found[name] = float(np.mean(aurocs))
    return found


def run(data, name, backbone, negatives, settings, seed):
    """Train and test one network, and return its row of the table."""
    import numpy as np

    model = make_model(data, backbone, negatives, settings, seed)
    untrained = quality(model, data)
    start = time.perf_counter()
    # Ten epochs, so that the last one has the means of the last tenth of the steps.
    history = model.fit(
        make_batches(data, model, seed),
        steps_per_epoch=FLAGS.train_steps // 10,
        epochs=10,
        shuffle=False,
        verbose=0,
    ).history
    return {
        "data": name,
        "backbone": backbone,
        "negatives": negatives,
        "settings": settings,
        "seed": seed,
        "steps": FLAGS.train_steps,
        "batch_size": FLAGS.batch_size,
        "learning_rate": FLAGS.learning_rate,
        "seconds": time.perf_counter() - start,
        "measure": "AUROC" if "ood" in data else "k-NN",
        "untrained": untrained,
        "trained": quality(model, data),
        "prototypes": model.student_head.num_prototypes,
        "history": {key: np.float64(values).tolist() for key, values in history.items()},
    }


def compared(result):
    """Return the quality before and after training.

    Trained features are compared as the head saw them: standardized with the default targets, as
    they are with the paper's. Untrained ones count as what is better for them.
    """
    seen = "raw" if result["settings"] == "paper" else "standardized"
    return max(result["untrained"].values()), result["trained"][seen]


def print_table(results):
    """Print all runs as a Markdown table, with both settings in one row."""
    print("| data | backbone | negatives | seed | untrained |", end="")
    print(" | ".join(f" {s}: trained | loss | entropy" for s in SETTINGS), "|")
    print("|---|---|---|--:" + "|--:" * (1 + 3 * len(SETTINGS)) + "|")
    rows = {}
    for result in results:
        key = tuple(result[part] for part in ("data", "backbone", "negatives", "seed"))
        rows.setdefault(key, {})[result["settings"]] = result
    order = (DATA, BACKBONES, NEGATIVES)

    def place(key):
        return [names.index(name) for names, name in zip(order, key[:3], strict=True)] + [key[3]]

    for key in sorted(rows, key=place):
        cells = [*map(str, key), f"{compared(next(iter(rows[key].values())))[0]:.3f}"]
        for settings in SETTINGS:
            result = rows[key].get(settings)
            if result is None:
                cells += ["", "", ""]
                continue
            before, after = compared(result)
            better = "" if after > before else " (worse)"
            loss = result["history"]["positive_loss"][-1] / math.log(result["prototypes"])
            entropy = result["history"]["teacher_entropy"][-1]
            # NaN counts as uniform too.
            uniform = "" if max(loss, entropy) <= UNIFORM else " uniform"
            cells += [f"{after:.3f}{better}", f"{loss:.3f}", f"{entropy:.3f}{uniform}"]
        print("|", " | ".join(cells), "|")


def print_differences(results):
    """Print what negatives add to none: mean over networks, 95 % interval (Student's t).

    A network's difference is the mean over the seeds that have both runs.
    """
    import numpy as np

    from tools.research.make_results import half_width

    after = {}
    for result in results:
        if result["settings"] == "default":
            key = tuple(result[part] for part in ("data", "negatives", "backbone", "seed"))
            after[key] = compared(result)[1]
    for data, negatives in itertools.product(DATA, NEGATIVES[1:]):
        pairs = {}
        for key, value in after.items():
            without = (data, NEGATIVES[0], *key[2:])
            if key[:2] == (data, negatives) and without in after:
                pairs.setdefault(key[2], []).append(value - after[without])
        networks = [np.mean(found) for found in pairs.values()]
        if len(networks) > 1:
            print(
                f"{data}, {negatives} minus none: {np.mean(networks):+.3f} ± "
                f"{half_width(networks):.3f} ({len(networks)} networks, "
                f"{sum(map(len, pairs.values()))} pairs of runs)"
            )


def main(argv=None):
    """Do the missing runs, then print the table of all runs and what negatives add."""
    vars(FLAGS).clear()  # Otherwise options of an earlier call would override the defaults.
    parser().parse_args(argv, FLAGS)
    only = [part for part in FLAGS.only.split(",") if part]
    runs_dir = pathlib.Path(FLAGS.runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    seeds = map(int, FLAGS.seeds.split(","))
    data = {}
    for parts in itertools.product(seeds, DATA, BACKBONES, NEGATIVES, SETTINGS):
        seed, source, backbone, negatives, settings = parts
        name = "-".join(map(str, (source, backbone, negatives, settings, seed)))
        path = runs_dir / f"{name}.json"
        # Parts are compared as a whole, so that `vit` does not match `vit_tiny`.
        named = (*map(str, parts), *negatives.split("-"))
        if FLAGS.table_only or path.exists() or not all(part in named for part in only):
            continue
        say(name)
        if source not in data:
            data = {source: read_data(source)}
        result = run(data[source], source, backbone, negatives, settings, seed)
        before, after = compared(result)
        say(f"  {before:.3f} to {after:.3f}")
        files.write_json(path, result)
    results = [json.loads(path.read_text()) for path in sorted(runs_dir.glob("*.json"))]
    print_table(results)
    print_differences(results)


if __name__ == "__main__":
    main()
