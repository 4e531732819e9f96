"""Evaluates a detector on sets of out-of-distribution images: a table with intervals.

`evaluate` measures; `markdown`, `csv` and `report.html` show what it found.
"""

from __future__ import annotations

import csv as csv_writer
import dataclasses
import io
import warnings
from typing import Any

import numpy as np

from sddns_tf import building, metrics
from sddns_tf.features import images_per_step, stream_features
from sddns_tf.types import Array

COLUMNS = ("auroc", "aupr_in", "aupr_out", "fpr95", "flagged")
PIXEL_COLUMNS = ("pixel_auroc", "aupro", "region_recall")
PIXEL_MEANING = (
    "Of maps: pixel_auroc is the chance that a damaged pixel scores higher than a sound one, aupro "
    "the per-region overlap up to 30 % false positives, region_recall the share of a damaged "
    "region that lies above the threshold."
)
FRESH = "fresh normal images"
ALL_MASKS = "all with masks"
INTERVALS = "95 % interval, by bootstrap or, of shares, Wilson's"
_ATTENTION_BATCH = 32


@dataclasses.dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        rows: Dict from the name of each set to a dict from a column to `(value, low, high)`. The
            normal images come last, under `FRESH`, and have only the column `flagged`.
        images: Dict from the name of each set to its images, uint8 `(N, H, W, 3)`.
        answers: Dict from the name of each set to what `Detector.predict` returned.
        threshold: Score above which images are flagged.
        false_positive_rate: What the detector promises.
        knn_accuracy: `(value, low, high)`, or None where there are no labels.
        features: Dict from the name of each set to features of its first images, `(n, D)`.
        pixels: Dict from the name of each set that has masks to a dict from each of
            `PIXEL_COLUMNS` to its value; where there are several, also from `ALL_MASKS`.
        lowest_score: Score of what is in the bank, for pictures of maps.
        files: Dict from the name of each set whose images came from files to their names.
    """

    rows: dict
    images: dict
    answers: dict
    threshold: float
    false_positive_rate: float
    knn_accuracy: tuple | None
    features: dict
    pixels: dict = dataclasses.field(default_factory=dict)
    lowest_score: float = -22.5
    files: dict = dataclasses.field(default_factory=dict)

    def title_of(self, name: str, index: int) -> str:
        """Return the title of an image: its file if it came from one, else its number."""
        return str(self.files[name][index]) if name in self.files else f"{name} #{index}"

    def as_dict(self) -> dict[str, Any]:
        """Return what goes into a JSON file: everything but images, their answers and features."""
        return {
            "confidence": 0.95,
            "sets": {
                name: {
                    "images": len(self.images[name]),
                    **{
                        column: {"value": value, "low": low, "high": high}
                        for column, (value, low, high) in row.items()
                    },
                }
                for name, row in self.rows.items()
            },
            "knn_accuracy": self.knn_accuracy
            and dict(zip(("value", "low", "high"), self.knn_accuracy, strict=True)),
            "threshold": self.threshold,
            "false_positive_rate": self.false_positive_rate,
            **({"pixels": self.pixels} if self.pixels else {}),
        }


def evaluate(
    detector: Any,
    normal: Array,
    ood: Any,
    labels: Array | None = None,
    labeled: Any = None,
    masks: Array | None = None,
    files: Any = None,
    resamples: int = 1000,
    feature_count: int = 300,
    batch_size: int | None = None,
    seed: int = 0,
    verbose: int | str = "auto",
) -> Evaluation:
    """Score normal images and each OOD set, and measure how well they are told apart.

    Args:
        detector: `Detector`.
        normal: In-distribution images that are neither trained nor calibrated on, uint8
            `(N, H, W, 3)`.
        ood: Dict from a name to images, uint8 `(M, H', W', 3)`.
        labels: Classes of the normal images, ints `(N,)`, for the k-NN accuracy; or None.
        labeled: Pair of in-distribution training images and their classes, also for k-NN.
        masks: For a local detector: dict from the name of an OOD set to masks of the damage in its
            images, bool `(M, H', W')`. Metrics of its maps are over its pixels and those of all
            normal images.
        files: Dict from the name of a set (`FRESH` is that of the normal images) to the names of
            its files, for pictures.
        resamples: Draws of the bootstrap.
        feature_count: Number of images of each set whose features are kept, for a map of them.
        batch_size: Images per forward pass, 256 by default, 32 for a local detector.
        seed: Int, for the bootstrap.
        verbose: As in Keras.

    Returns:
        `Evaluation`.

    Raises:
        ValueError: If there is no OOD set, one has the name of the normal images, or masks do not
            fit.

    Example:
        >>> found = evaluate(detector, test_images, {"textures": textures})
        >>> print(markdown(found))
    """
    if not ood or FRESH in ood:
        raise ValueError(
            f"`ood` must hold at least one set, none of the name {FRESH!r}. Received: {list(ood)}"
        )
    masks = {name: np.asarray(mask) for name, mask in (masks or {}).items()}
    _check_masks(detector, masks, ood)
    images = {**ood, FRESH: normal}
    batch_size = images_per_step(detector.extractor, batch_size)
    answers = {
        name: detector.predict(x, batch_size=batch_size, verbose=verbose)
        for name, x in images.items()
    }
    normal_scores = answers[FRESH]["ood_score"]
    rows = {
        name: table_row(normal_scores, answer, name == FRESH, resamples, seed)
        for name, answer in answers.items()
    }
    features = {
        name: _one_each(detector.extractor, x[:feature_count], batch_size, verbose=0)
        for name, x in images.items()
    }
    _warn_of_known_images(detector, features[FRESH], normal_scores[:feature_count])
    return Evaluation(
        rows=rows,
        images=images,
        answers=answers,
        threshold=detector.threshold,
        false_positive_rate=detector.false_positive_rate,
        knn_accuracy=_knn_accuracy(detector, normal, labels, labeled, batch_size, verbose),
        features=features,
        pixels=_pixel_rows(detector, answers, masks),
        lowest_score=detector.lowest_score,
        files=files or {},
    )


def _warn_of_known_images(detector, features, scores):
    """Warn if normal images to test on are in the bank, as far as that can be seen."""
    if detector.is_local:
        known = np.count_nonzero(scores <= detector.lowest_score + detector.rounding)
    else:
        known = building.count_shared(detector.bank.numpy(), features)
    if known:
        warnings.warn(
            f"{known} of the first {len(scores)} normal images to test on are in the detector's "
            "bank. New images will have higher scores, and more of them will be flagged. Test on "
            "images that were neither trained nor calibrated on.",
            stacklevel=3,
        )


def _check_masks(detector, masks, ood):
    if masks and not detector.is_local:
        raise ValueError(
            "`masks` are compared with anomaly maps, and this detector gives none: make one with "
            f"`layers`. Received: masks of {list(masks)}"
        )
    for name, mask in masks.items():
        expected = np.shape(ood.get(name, ()))[:3]
        if mask.shape != expected or mask.dtype != bool:
            raise ValueError(
                "`masks` must be bool, of the shape of the set's images. Received: "
                f"{name!r} of shape {mask.shape} and dtype {mask.dtype} for images of {expected}"
            )


def _one_each(extractor, images, batch_size, verbose):
    """Return features `(n, D)`; maps are averaged over places, batch by batch."""
    batches = stream_features(extractor, images, batch_size=batch_size, verbose=verbose)
    return np.concatenate(
        [batch if batch.ndim == 2 else batch.mean(axis=(1, 2)) for batch in batches]
    )


def _pixel_rows(detector, answers, masks):
    """Compute metrics of the maps of each set with masks, and of all those sets together."""
    rows = {name: _pixel_row(detector, answers, {name: mask}) for name, mask in masks.items()}
    if len({mask.shape[1:] for mask in masks.values()}) == 1 and len(masks) > 1:
        rows[ALL_MASKS] = _pixel_row(detector, answers, masks)
    return rows


def _pixel_row(detector, answers, masks):
    """Compute metrics of the maps of sets and of normal images, at the size of the sets' masks."""
    size = next(iter(masks.values())).shape[1:]
    maps = [metrics.at_size(answers[one]["anomaly_map"], size) for one in (*masks, FRESH)]
    masks = [*masks.values(), np.zeros(maps[-1].shape, bool)]
    maps, masks = np.concatenate(maps), np.concatenate(masks)
    return {
        "pixel_auroc": metrics.pixel_auroc(maps, masks),
        "aupro": metrics.aupro(maps, masks),
        "region_recall": metrics.region_recall(maps, masks, detector.threshold),
    }


def table_row(
    normal_scores: Array, answer: dict[str, Array], is_normal: bool, resamples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Return a row of `Evaluation.rows`: each column's value and its interval.

    Args:
        normal_scores: Scores of the normal images, `(N,)`.
        answer: The detector's answers for the images of the set, dict of arrays `(M,)`.
        is_normal: Whether the set is that of the normal images, which has no AUROC.
        resamples: Draws of the bootstrap.
        seed: Int, for the bootstrap.

    Returns:
        Dict from a column to `(value, low, high)`.
    """
    flagged = float(np.mean(answer["is_ood"]))
    row = {"flagged": (flagged, *metrics.share_interval(flagged, len(answer["is_ood"])))}
    if is_normal:
        return row
    pair = normal_scores, answer["ood_score"]
    intervals = metrics.ood_metric_intervals(*pair, resamples=resamples, seed=seed)
    values = metrics.ood_metrics(*pair)
    return {**{name: (value, *intervals[name]) for name, value in values.items()}, **row}


def _knn_accuracy(detector, normal, labels, labeled, batch_size, verbose):
    if labels is None or labeled is None:
        return None
    known, classes = labeled
    accuracy = metrics.knn_accuracy(
        _one_each(detector.extractor, known, batch_size, verbose),
        classes,
        _one_each(detector.extractor, normal, batch_size, verbose),
        labels,
        k=min(20, len(known)),
    )
    return accuracy, *metrics.share_interval(accuracy, len(labels))


def attention_maps(detector: Any, images: Array) -> np.ndarray | None:
    """Return where the class token of a vision transformer attends, averaged over heads.

    Args:
        detector: `Detector`.
        images: uint8 `(N, H, W, 3)`.

    Returns:
        Float32 `(N, rows, columns)`, or None if the backbone has no attention weights.
    """
    extractor = detector.extractor
    if not hasattr(extractor.backbone, "attention_weights"):
        return None
    patch = extractor.backbone.patch_size
    rows, columns = (side // patch for side in extractor.image_size)
    maps = []
    for start in range(0, len(images), _ATTENTION_BATCH):
        batch = images[start : start + _ATTENTION_BATCH]
        weights = np.asarray(extractor.backbone.attention_weights(extractor.preprocess(batch)))
        maps.append(weights[:, :, 0, 1:].mean(axis=1).reshape(-1, rows, columns))
    return np.concatenate(maps)


def markdown(evaluation: Any) -> str:
    """Return the table as Markdown: each value with its 95 % interval."""
    lines = [
        "| set | images | " + " | ".join(COLUMNS) + " |",
        "|---|---:|" + "---:|" * len(COLUMNS),
    ]
    for name, row in evaluation.rows.items():
        cells = [cell(row[column]) if column in row else "" for column in COLUMNS]
        lines.append(
            f"| {_escaped(name)} | {len(evaluation.images[name])} | " + " | ".join(cells) + " |"
        )
    lines += ["", f"In brackets: {INTERVALS}. {promise(evaluation)}"]
    if evaluation.pixels:
        lines += ["", "| set | " + " | ".join(PIXEL_COLUMNS) + " |"]
        lines += ["|---|" + "---:|" * len(PIXEL_COLUMNS)]
        for name, row in evaluation.pixels.items():
            pixels = " | ".join(f"{row[column]:.3f}" for column in PIXEL_COLUMNS)
            lines.append(f"| {_escaped(name)} | {pixels} |")
        lines += ["", PIXEL_MEANING]
    if evaluation.knn_accuracy:
        lines += ["", f"k-NN accuracy of the features: {cell(evaluation.knn_accuracy)}"]
    return "\n".join(lines) + "\n"


def _escaped(name):
    return name.replace("|", "\\|")


def promise(evaluation: Any) -> str:
    """Return a sentence on the threshold and the share of normal images that it may flag."""
    return (
        f"Flagged: score above {evaluation.threshold:.4g}, calibrated to flag at most "
        f"{evaluation.false_positive_rate:.1%} of normal images."
    )


def cell(interval: Any) -> str:
    """Return a value and its interval as text."""
    value, low, high = interval
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def csv(evaluation: Any) -> str:
    """Return the tables as comma-separated values, with interval limits in their own columns."""
    text = io.StringIO()
    writer = csv_writer.writer(text, lineterminator="\n")
    parts = [part for c in COLUMNS for part in (c, f"{c}_low", f"{c}_high")]
    of_pixels = PIXEL_COLUMNS if evaluation.pixels else ()
    writer.writerow(["set", "images", *parts, *of_pixels])
    rows = {**{name: {} for name in evaluation.pixels}, **evaluation.rows}
    for name, row in rows.items():
        cells = [value for c in COLUMNS for value in row.get(c, ("", "", ""))]
        pixels = [evaluation.pixels.get(name, {}).get(column, "") for column in of_pixels]
        writer.writerow([name, len(evaluation.images.get(name, ())) or "", *cells, *pixels])
    return text.getvalue()
