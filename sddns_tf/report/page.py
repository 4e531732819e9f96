"""Write an evaluation as one self-contained HTML page: tables, charts and images."""

from __future__ import annotations

import base64
import html as escaping
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from sddns_tf import evaluation as found
from sddns_tf import files, image_ops, plots
from sddns_tf.report import charts
from sddns_tf.report.style import STYLE

_THUMBNAIL = 128
_ROC_POINTS = 300
_MEANING = {
    "auroc": "Probability that an OOD image scores higher than a normal one.",
    "aupr_in": "Average precision with normal images as positives.",
    "aupr_out": "Average precision with OOD images as positives.",
    "fpr95": "Share of OOD images accepted at the threshold that accepts 95 % of normal ones.",
    "flagged": "Share of images above the calibrated threshold.",
}


def write(
    path: str | os.PathLike,
    evaluation: Any,
    detector: Any,
    title: str = "Evaluation",
    configuration: dict[str, Any] | None = None,
    gallery_size: int = 12,
) -> pathlib.Path:
    """Write an evaluation as an HTML page.

    The page contains everything, including images, and loads nothing from the network. It follows
    the reader's light or dark mode, fits on a phone and can be printed. The file is written
    completely or not at all.

    Args:
        path: File to write (.html).
        evaluation: Result of `evaluation.evaluate`.
        detector: The `Detector`, for the attention maps of its backbone.
        title: Title of the page.
        configuration: Dict of settings to list at the end.
        gallery_size: Approximate number of images in each gallery.

    Returns:
        `pathlib.Path` of the file.

    Example:
        >>> evaluation = sddns_tf.evaluation.evaluate(detector, test_images, {"dtd": textures})
        >>> sddns_tf.report.write("report.html", evaluation, detector)
    """
    files.write_text(path, html(evaluation, detector, title, configuration, gallery_size))
    return pathlib.Path(path)


def html(
    evaluation: Any,
    detector: Any,
    title: str = "Evaluation",
    configuration: dict[str, Any] | None = None,
    gallery_size: int = 12,
) -> str:
    """Return the HTML of the page. The arguments are those of `write`."""
    title = escaping.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<h1>{title}</h1>"
        + _table(evaluation)
        + _histograms(evaluation)
        + _curves(evaluation)
        + _galleries(evaluation, detector, gallery_size)
        + _configuration(configuration)
        + "</body></html>\n"
    )


# --- Table and charts --------------------------------------------------------------------------


def _table(evaluation):
    head = "".join(
        f'<th scope="col" title="{meaning}">{name}</th>' for name, meaning in _MEANING.items()
    )
    rows = []
    for name, row in evaluation.rows.items():
        cells = "".join(
            f'<td data-label="{column}">{_cell(row[column])}</td>' if column in row else "<td></td>"
            for column in found.COLUMNS
        )
        count = f'<td data-label="images">{len(evaluation.images[name])}</td>'
        rows.append(f"<tr><td>{escaping.escape(name)}</td>{count}{cells}</tr>")
    notes = [found.promise(evaluation), f"Below each value: its {found.INTERVALS}."]
    if evaluation.knn_accuracy:
        notes.append(f"k-NN accuracy of the features: {found.cell(evaluation.knn_accuracy)}.")
    pixels = _pixel_table(evaluation) if evaluation.pixels else ""
    meanings = " ".join(f"<b>{name}</b>: {meaning}" for name, meaning in _MEANING.items())
    return (
        f"<p>{' '.join(notes)}</p><table><thead><tr><th>set</th><th>images</th>{head}</tr></thead>"
        f'<tbody>{"".join(rows)}</tbody></table><p class="soft"><small>{meanings}</small></p>'
        + pixels
    )


def _pixel_table(evaluation):
    head = "".join(f'<th scope="col">{name}</th>' for name in found.PIXEL_COLUMNS)
    rows = [
        f"<tr><td>{escaping.escape(name)}</td>"
        + "".join(f'<td data-label="{c}">{row[c]:.3f}</td>' for c in found.PIXEL_COLUMNS)
        + "</tr>"
        for name, row in evaluation.pixels.items()
    ]
    return (
        f"<table><thead><tr><th>set</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'<p class="soft"><small>{found.PIXEL_MEANING}</small></p>'
    )


def _cell(interval):
    value, low, high = interval
    return f"<span>{value:.3f}<small>{low:.3f}&ndash;{high:.3f}</small></span>"


def _ood_names(evaluation):
    return [name for name in evaluation.rows if name != found.FRESH]


def _scores(evaluation, name):
    return np.asarray(evaluation.answers[name]["ood_score"])


def _histograms(evaluation):
    everything = np.concatenate([_scores(evaluation, name) for name in evaluation.rows])
    low, high = np.quantile(everything, [0.001, 0.999])
    limits = (low, high) if high > low else (low - 1.0, high + 1.0)
    normal = _scores(evaluation, found.FRESH)
    cards = []
    for index, name in enumerate(_ood_names(evaluation), 1):
        scores = _scores(evaluation, name)
        chart = charts.histograms(normal, scores, index, evaluation.threshold, limits)
        legend = _legend({0: found.FRESH, index: name}, "area")
        cards.append(f'<div class="card"><h3>{escaping.escape(name)}</h3>{chart}{legend}</div>')
    return (
        '<h2>Scores</h2><p class="soft">Each histogram is scaled to its own peak. Dashed: the '
        "threshold. Scores outside the axis are counted in the outermost bins.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _curves(evaluation):
    charts = {"ROC": _roc, "Calibration": _calibration, "Features": _map}
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{chart(evaluation)}</div>'
        for title, chart in charts.items()
    )
    return f'<h2>Curves</h2><div class="cards">{cards}</div>'


def _roc(evaluation):
    from sklearn.metrics import roc_curve

    normal, curves, labels = _scores(evaluation, found.FRESH), {}, {}
    for index, name in enumerate(_ood_names(evaluation), 1):
        scores = _scores(evaluation, name)
        is_ood = np.repeat([0, 1], [len(normal), len(scores)])
        x, y, _ = roc_curve(is_ood, np.concatenate([normal, scores]))
        kept = np.unique(np.linspace(0, len(x) - 1, _ROC_POINTS).round().astype(int))
        curves[index] = x[kept], y[kept]
        labels[index] = f"{name} {evaluation.rows[name]['auroc'][0]:.3f}"
    return charts.roc(curves) + _legend(labels, "line")


def _calibration(evaluation):
    from scipy.stats import binom

    p_values = np.sort(evaluation.answers[found.FRESH]["p_value"])
    promised = np.geomspace(max(p_values[0], 1e-4), 1.0, 120)
    measured = np.searchsorted(p_values, promised, side="right") / len(p_values)
    low, high = (
        binom.ppf(tail, len(p_values), promised) / len(p_values) for tail in (0.025, 0.975)
    )
    rate, (flagged, *_) = evaluation.false_positive_rate, evaluation.rows[found.FRESH]["flagged"]
    return (
        charts.calibration(promised, measured, low, high)
        + f"<p class='soft'><small>Promised at most {rate:.1%}, measured {flagged:.1%}. "
        "Band: where 95 % of samples of this size would lie if the promise held "
        "exactly.</small></p>"
    )


def _map(evaluation):
    from sklearn.decomposition import PCA

    features = evaluation.features
    order = [found.FRESH, *_ood_names(evaluation)]
    pca = PCA(2, random_state=0).fit(np.concatenate([features[name] for name in order]))
    points = {name: pca.transform(features[name]) for name in order}
    share = pca.explained_variance_ratio_.sum()
    return (
        charts.scatter(points)
        + _legend(dict(enumerate(order)), "point")
        + f'<p class="soft"><small>Principal components of at most '
        f"{max(map(len, features.values()))} images of each set; they explain {share:.0%} of the "
        "variance.</small></p>"
    )


def _legend(names, kind):
    """Return a legend, given the names of series by their index."""
    items = "".join(
        f"<li>{charts.key(index, kind)}{escaping.escape(name)}</li>"
        for index, name in names.items()
    )
    return f'<ul class="legend">{items}</ul>'


# --- Galleries ---------------------------------------------------------------------------------


def _galleries(evaluation, detector, size):
    ood = _ood_names(evaluation)
    distance = {
        name: np.abs(_scores(evaluation, name) - evaluation.threshold) for name in evaluation.rows
    }
    scores = {name: _scores(evaluation, name) for name in evaluation.rows}
    flagged = {name: evaluation.answers[name]["is_ood"] for name in evaluation.rows}
    galleries = {
        "Most anomalous": {name: np.argsort(-scores[name]) for name in ood},
        "Borderline": {name: np.argsort(distance[name]) for name in evaluation.rows},
        "Missed": {name: _first(np.argsort(scores[name]), ~flagged[name]) for name in ood},
        "False alarms": {
            found.FRESH: _first(np.argsort(-scores[found.FRESH]), flagged[found.FRESH])
        },
    }
    if detector.is_local:
        least = {found.FRESH: np.argsort(scores[found.FRESH])}
        galleries = {"Least anomalous": least, **galleries}
    meanings = {
        "Least anomalous": "Normal images with the lowest scores.",
        "Most anomalous": "Images with the highest scores in each set.",
        "Borderline": "Images with scores close to the threshold.",
        "Missed": "OOD images that are not flagged, those with the lowest scores in each set.",
        "False alarms": "Normal images that are flagged, those with the highest scores.",
    }
    parts = []
    for title, orders in galleries.items():
        each = -(-size // len(orders))
        chosen = [(name, index) for name, order in orders.items() for index in order[:each]]
        parts.append(f'<h2>{title}</h2><p class="soft">{meanings[title]}</p>')
        parts.append(_gallery(evaluation, detector, chosen) if chosen else "<p>None.</p>")
    return "".join(parts)


def _first(order, wanted):
    return order[wanted[order]]


def _gallery(evaluation, detector, chosen):
    figures, wide = [], False
    for name, index in chosen:
        image = evaluation.images[name][index]
        answer = evaluation.answers[name]
        if detector.is_local:
            wide = True
            picture = _overlay(evaluation, image, answer["anomaly_map"][index])
        else:
            maps = found.attention_maps(detector, image[np.newaxis])
            wide = maps is not None
            picture = _picture(image, None if maps is None else maps[0])
        verdict = "flagged" if answer["is_ood"][index] else "accepted"
        figures.append(
            f"<figure>{picture}<figcaption>{escaping.escape(evaluation.title_of(name, index))}<br>"
            f"score {answer['ood_score'][index]:.3f}, p {answer['p_value'][index]:.2g}, {verdict}"
            "</figcaption></figure>"
        )
    width = "9.5rem" if wide else "6rem"
    right = "attention of the network; bright where it is high."
    if detector.is_local:
        right = (
            "places above the threshold, from yellow at the threshold to red at twice its distance "
            "from the bank; all images have the same scale."
        )
    note = f'<p class="soft"><small>Right: {right}</small></p>' if wide else ""
    return f'<div class="gallery" style="--w:{width}">{"".join(figures)}</div>{note}'


def _overlay(evaluation, image, anomaly_map):
    """Return an image, and next to it the same with places above the threshold colored."""
    image = _thumbnail(image)
    painted = plots.overlay(image, anomaly_map, evaluation.threshold, evaluation.lowest_score)
    kind = "pair small" if max(image.shape[:2]) <= 64 else "pair"
    sides = "".join(f'<span><img src="{_data_uri(x)}" alt=""></span>' for x in (image, painted))
    return f'<div class="{kind}">{sides}</div>'


def _thumbnail(image):
    height, width = image.shape[:2]
    scale = min(1.0, _THUMBNAIL / max(height, width))
    if scale < 1.0:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = np.clip(np.round(image_ops.resize(image[np.newaxis], *size)[0]), 0, 255)
    return image


def _picture(image, attention):
    height, width = image.shape[:2]
    image = _thumbnail(image)
    shown = f'<img src="{_data_uri(image)}" alt="">'
    kind = "pair small" if max(height, width) <= 64 else "pair"
    if attention is None:
        return f'<div class="{kind}"><span>{shown}</span></div>'
    spread = np.ptp(attention)
    bright = (attention - attention.min()) / spread if spread else np.ones_like(attention)
    shade = np.zeros((*attention.shape, 4))
    shade[..., 3] = 215 * (1.0 - bright)
    over = f'<img class="attention" src="{_data_uri(shade)}" alt="">'
    return f'<div class="{kind}"><span>{shown}</span><span>{shown}{over}</span></div>'


def _data_uri(pixels):
    """Return pixels `(H, W, 3 or 4)` in 0-255 as the data URI of a PNG."""
    png = tf.io.encode_png(np.asarray(pixels).astype(np.uint8)).numpy()
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# --- Configuration -----------------------------------------------------------------------------


def _configuration(configuration):
    if not configuration:
        return ""
    items = "".join(
        f"<div><dt>{escaping.escape(str(name))}</dt><dd>{escaping.escape(str(value))}</dd></div>"
        for name, value in configuration.items()
    )
    return f"<h2>Configuration</h2><dl>{items}</dl>"
