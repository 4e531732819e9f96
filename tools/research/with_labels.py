r"""What labels would give: a classifier of sound and broken cells on the features of one network.

    python examples/solar_cells.py --split_seed=0 --networks=aligned --output_dir=solar/0
    python -m tools.research.with_labels --output_dir=solar/0 --type=mono

A detector without labels can hardly rank better than a classifier that was shown broken cells. So
this says how much is left to gain with a network. The classifier is a logistic regression on what
EfficientNet-lite0 (the frozen one of the example) sees in three layers: mean, deviation, smallest
and largest value of each channel over the image. It learns from the sound cells that the detector
has for training and calibration, and from four fifths of the broken ones; it is tested with the
fresh sound cells and the other broken ones, five times in turn. Its strength of regularization is
chosen by cross-validation inside the training part.

The broken cells are divided at random, and then again in the order of the data set, in which cells
that look alike follow each other. The first is a bound; the second is closer to what labels are
worth for damage of a kind that nobody has labeled yet. Writes both mean AUROCs to
`labels_TYPE.json`, which `inspection_table` puts beside the detectors.
"""

import pathlib

import numpy as np

from sddns_tf import files, metrics
from sddns_tf.features import FeatureExtractor, extract_features
from tools.benchmark import inspection

LAYERS = ("block_4", "block_10", "block_14")
PARTS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def parser():
    """Return the arguments."""
    return inspection.cells_parser(__doc__)


def pooled(images, extractors):
    """Return four statistics of each channel of some layers, `(N, 4 C)`."""
    found = []
    for extractor in extractors:
        maps = extract_features(extractor, images, batch_size=32, verbose=0)
        found += [function(maps, axis=(1, 2)) for function in (np.mean, np.std, np.min, np.max)]
    return np.concatenate(found, axis=1)


def classifier():
    """Return a logistic regression on standardized features, its strength still to be chosen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    parts = StratifiedKFold(PARTS, shuffle=True, random_state=0)
    return GridSearchCV(steps, {"logisticregression__C": STRENGTHS}, scoring="roc_auc", cv=parts)


def auroc_with_labels(known, fresh, broken):
    """Return the mean AUROC of classifiers that each see all broken cells but a fifth.

    Args:
        known: Features of sound cells to learn from, `(N, D)`.
        fresh: Features of other sound cells.
        broken: Features of broken cells; each fifth is a part of consecutive ones.
    """
    found = []
    for part in np.array_split(np.arange(len(broken)), PARTS):
        others = np.delete(broken, part, axis=0)
        labels = np.repeat([0, 1], [len(known), len(others)])
        fitted = classifier().fit(np.concatenate([known, others]), labels)
        scores = [fitted.decision_function(features) for features in (fresh, broken[part])]
        found.append(metrics.ood_metrics(*scores)["auroc"])
    return float(np.mean(found))


def main(argv=None):
    """Write the two AUROCs, and print them."""
    options = parser().parse_args(argv)
    cells = inspection.cells_of(options)
    from examples import solar_cells

    network = solar_cells.pretrained_network()
    extractors = [
        FeatureExtractor(network, layers=layer, image_size=solar_cells.SIZE) for layer in LAYERS
    ]
    train, calibration, fresh, broken = (pooled(images, extractors) for images in cells)
    known = np.concatenate([train, calibration])
    mixed = np.random.default_rng(options.split_seed).permutation(broken)
    record = {
        "auroc": auroc_with_labels(known, fresh, mixed),
        "auroc_in_order": auroc_with_labels(known, fresh, broken),
        "images": [len(known), len(fresh), len(broken)],
    }
    files.write_json(pathlib.Path(options.output_dir) / f"labels_{options.type}.json", record)
    print(f"{options.type}, split {options.split_seed}: {record}")


if __name__ == "__main__":
    main()
