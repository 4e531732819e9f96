r"""Measure what a second voice adds to the score of detectors of CIFAR-10.

    python -m tools.research.second_voice --data_dir=TFDS --auxiliary_exclude=FILE \
        --detectors=runs/small --weights=0,1,2,4,8 --json=development.json

The weight and the regularization of the logistic regression are chosen with
`--sets=development`; then `--sets=test` is looked at once. Takes all `.keras` files of a folder,
extracts their features once and scores them with each weight: AUROC of each set, and the mean of
all but the auxiliary set, from which the second voice is made. At the end come means over seeds and
paired differences to the paper's score, with 95 % intervals (Student's t). Files are named
STRATEGY-SEED.keras. Records go to the file `--json`, and what it holds is not measured again.
"""

import json
import pathlib

import keras
import numpy as np

import sddns_tf
from sddns_tf import files, metrics
from tools.research import cifar10
from tools.research.make_results import half_width


def parse(argv):
    """Return settings of a command line."""
    parser = cifar10.parser(__doc__)
    add = parser.add_argument
    add("--detectors", required=True, help="folder of STRATEGY-SEED.keras files")
    add("--weights", default="0,4", help="weights of the second voice, 0 first")
    add("--auxiliary_images", type=int, default=10_000, help="how many images make the voice")
    add("--json", required=True, help="file of records")
    settings = parser.parse_args(argv)
    settings.weights = [float(weight) for weight in settings.weights.split(",")]
    if settings.weights[0] != 0.0:
        parser.error(
            f"--weights must begin with 0, the paper's score. Received: {settings.weights}"
        )
    return settings


def auxiliary_images(settings):
    """Return images that trained the negatives, drawn at random."""
    excluded = cifar10.excluded_classes(settings)
    images = cifar10.read(settings, settings.auxiliary, "train", excluded)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[: settings.auxiliary_images]]


def measured(settings, extractor, normal, auxiliary, ood):
    """Return AUROCs by weight and set."""
    features_of = cifar10.features_with(extractor)
    bank, calibration, fresh, others = (
        features_of(images)
        for images in (
            normal.training[: settings.bank_images],
            normal.calibration,
            normal.fresh,
            auxiliary,
        )
    )
    found = {name: features_of(images) for name, images in ood.items()}
    rows = {}
    for weight in settings.weights:
        detector = sddns_tf.Detector.from_features(
            extractor,
            bank,
            calibration,
            auxiliary_features=others if weight else None,
            auxiliary_weight=weight,
        )

        def score(features, detector=detector):
            parts = np.array_split(features, max(1, len(features) // 500))
            return np.concatenate([detector.scores(part)["ood_score"] for part in parts])

        normal_scores = score(fresh)
        rows[f"{weight:g}"] = {
            name: metrics.ood_metrics(normal_scores, score(features))["auroc"]
            for name, features in found.items()
        }
    return rows


def print_table(records, auxiliary):
    """Print means over the seeds of each strategy, and paired differences, in Markdown."""
    strategies = sorted({name.rpartition("-")[0] for name in records})
    sets = list(next(iter(records.values()))["0"])
    alone = [name for name in sets if name != auxiliary]
    heads = ("strategy", "weight", "seeds", *sets, f"mean without {auxiliary}", "minus weight 0")
    print(f"| {' | '.join(heads)} |\n|---{'|--:' * (len(heads) - 1)}|")
    for strategy in strategies:
        of_seeds = [rows for name, rows in records.items() if name.rpartition("-")[0] == strategy]
        means = {
            weight: np.array([np.mean([rows[weight][name] for name in alone]) for rows in of_seeds])
            for weight in of_seeds[0]
        }
        for weight, mean in means.items():
            cells = [np.mean([rows[weight][name] for rows in of_seeds]) for name in sets]
            values = " | ".join(f"{value:.3f}" for value in (*cells, mean.mean()))
            difference = ""
            if weight != "0" and len(mean) > 1:
                gains = mean - means["0"]
                difference = f"{gains.mean():+.3f} ± {half_width(gains):.3f}"
            print(f"| {strategy} | {weight} | {len(mean)} | {values} | {difference} |")


def check_same_sets(settings, records):
    """Raise a `ValueError` unless records are of the kind of sets that was asked for."""
    for name, rows in records.items():
        kind = "development" if "noise" in next(iter(rows.values())) else "test"
        if kind != settings.sets:
            raise ValueError(
                f"--json must be a file of {settings.sets} sets. Received: {settings.json}, whose "
                f"{name} was measured on {kind} sets"
            )


def main(argv=None):
    """Measure the detectors that have no record yet, and print the table."""
    settings = parse(argv)
    target = pathlib.Path(settings.json)
    records = json.loads(target.read_text()) if target.exists() else {}
    paths = sorted(pathlib.Path(settings.detectors).glob("*-*.keras"))
    check_same_sets(settings, records)
    weights = {f"{weight:g}" for weight in settings.weights}
    missing = [path for path in paths if not weights <= set(records.get(path.stem, ()))]
    if missing:
        normal = cifar10.read_normal(settings)
        auxiliary = auxiliary_images(settings)
        ood = cifar10.read_ood(settings, normal)
    for path in missing:
        extractor = keras.models.load_model(path).extractor
        records[path.stem] = measured(settings, extractor, normal, auxiliary, ood)
        files.write_json(target, records)
    print_table(records, settings.auxiliary)


if __name__ == "__main__":
    main()
