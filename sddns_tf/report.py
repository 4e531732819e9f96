"""An evaluation as one HTML page that needs no network: tables, charts, pictures."""

import base64
import html as escaping
import os
import pathlib
import uuid

import numpy as np
import tensorflow as tf

from sddns_tf import evaluation as found
from sddns_tf import image_ops, report_charts

_THUMBNAIL = 128
_ROC_POINTS = 300
_MEANING = {
    "auroc": "Chance that an OOD image scores higher than a normal one.",
    "aupr_in": "Average precision with normal images as positives.",
    "aupr_out": "Average precision with OOD images as positives.",
    "fpr95": "OOD images accepted where 95 % of normal ones are.",
    "flagged": "Share above the calibrated threshold.",
}
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#59636e;
--rule:#d4d9df;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b0508f;--c4:#b37400;--c5:#2a8bc9;
--c6:#444}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1d2127;--ink:#e8eaed;
--soft:#a3acb6;--rule:#3a414a;--c0:#56b4e9;--c1:#ff8a3d;--c2:#2fd0a0;--c3:#e29ac5;--c4:#f0b429;
--c5:#8ad0ff;--c6:#ccc}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:0 0 .25rem;overflow-wrap:anywhere}p{max-width:46rem;margin:.4rem 0}
.soft,small{color:var(--soft)}
table{border-collapse:collapse;width:100%}
th,td{padding:.4rem .6rem;border-bottom:1px solid var(--rule);text-align:right;
vertical-align:top}
th:first-child,td:first-child{text-align:left;overflow-wrap:anywhere}
td small{display:block;white-space:nowrap}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
.card{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.75rem;
break-inside:avoid}
.chart{display:block;width:100%;height:auto;max-width:30rem;overflow:visible}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif}
.chart .axis{stroke:var(--soft);fill:none}.chart .faint{stroke:var(--rule);fill:none}
.chart .ink{stroke:var(--ink);fill:none;stroke-width:1.3}.band{fill:var(--c0);opacity:.18}
.line{fill:none;stroke:var(--c);stroke-width:1.8}.area{fill:var(--c);fill-opacity:.3;
stroke:var(--c);stroke-width:1.2}.point{fill:var(--c);opacity:.75}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}
.s5{--c:var(--c5)}.s6{--c:var(--c6)}
.legend{list-style:none;padding:0;margin:.4rem 0 0;font-size:.85rem;display:flex;flex-wrap:wrap;
gap:.1rem 1rem}.legend li{overflow-wrap:anywhere}
.key{width:26px;height:12px;margin-right:.35rem;vertical-align:middle}
.gallery{display:grid;gap:.75rem;grid-template-columns:repeat(auto-fill,minmax(var(--w),1fr))}
figure{margin:0;font-size:.8rem;line-height:1.3;break-inside:avoid;min-width:0}
figcaption{overflow-wrap:anywhere;margin-top:.2rem}
.pair{display:flex;gap:3px}.pair>*{flex:1 1 0;min-width:0;position:relative}
.pair img{display:block;width:100%;height:auto}
.small img:first-child{image-rendering:pixelated}
.pair .attention{position:absolute;inset:0;height:100%;image-rendering:auto}
dl{columns:18rem;column-gap:2rem;font-size:.85rem;margin:0}
dl div{break-inside:avoid;display:flex;gap:.5rem;justify-content:space-between;
border-bottom:1px solid var(--rule);padding:.1rem 0}
dt{color:var(--soft)}dd{margin:0;text-align:right;overflow-wrap:anywhere}
@media screen and (max-width:40rem){thead{display:none}tr,td{display:block}
tr{border-bottom:1px solid var(--rule);padding:.5rem 0}td{border:0;padding:.1rem 0;
display:flex;justify-content:space-between;gap:1rem}td:first-child{font-weight:600}
td[data-label]::before{content:attr(data-label);color:var(--soft)}td:empty{display:none}
td small{display:inline;margin-left:.5rem}}
@media print{body{font-size:10pt;padding:0;max-width:none;print-color-adjust:exact;
-webkit-print-color-adjust:exact}h2{break-after:avoid}.card{border-color:#bbb}}
"""


def write(path, evaluation, detector, title="Evaluation", configuration=None, gallery_size=12):
    """Writes an evaluation as a page: whole, or not at all.

    The page holds everything, pictures included, and asks the network for nothing. It follows the
    reader's light or dark mode, fits a phone and prints.

    Args:
        path: File to write (.html).
        evaluation: From `evaluation.evaluate`.
        detector: The `Detector`, for the attention of its backbone.
        title: Title of the page.
        configuration: Dict of settings to list at the end.
        gallery_size: Images in each gallery, about.

    Returns:
        `pathlib.Path` of the file.

    Example:
        >>> evaluation = sddns_tf.evaluation.evaluate(detector, test_images, {"dtd": textures})
        >>> sddns_tf.report.write("report.html", evaluation, detector)
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        text = html(evaluation, detector, title, configuration, gallery_size)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def html(evaluation, detector, title="Evaluation", configuration=None, gallery_size=12):
    """The text of the page that `write` writes; arguments as there."""
    title = escaping.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
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
    notes = [found.promise(evaluation), "Below each value: its 95 % bootstrap interval."]
    if evaluation.knn_accuracy:
        notes.append(f"k-NN accuracy of the features: {found.cell(evaluation.knn_accuracy)}.")
    meanings = " ".join(f"<b>{name}</b>: {meaning}" for name, meaning in _MEANING.items())
    return (
        f"<p>{' '.join(notes)}</p><table><thead><tr><th>set</th><th>images</th>{head}</tr></thead>"
        f'<tbody>{"".join(rows)}</tbody></table><p class="soft"><small>{meanings}</small></p>'
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
        chart = report_charts.histograms(normal, scores, index, evaluation.threshold, limits)
        legend = _legend({0: found.FRESH, index: name}, "area")
        cards.append(f'<div class="card"><h3>{escaping.escape(name)}</h3>{chart}{legend}</div>')
    return (
        '<h2>Scores</h2><p class="soft">Each histogram is scaled to its own peak. Dashed: the '
        "threshold. Scores beyond the axis are counted in the outermost bins.</p>"
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
    return report_charts.roc(curves) + _legend(labels, "line")


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
        report_charts.calibration(promised, measured, low, high)
        + f"<p class='soft'><small>Promised at most {rate:.1%}, measured {flagged:.1%}. "
        "Band: where 95 % of samples of so many images would lie if the promise held "
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
        report_charts.scatter(points)
        + _legend(dict(enumerate(order)), "point")
        + f'<p class="soft"><small>Principal components of at most '
        f"{max(map(len, features.values()))} images of each set; they hold {share:.0%} of the "
        "variance.</small></p>"
    )


def _legend(names, kind):
    """The names of series by their index, each with its mark."""
    items = "".join(
        f"<li>{report_charts.key(index, kind)}{escaping.escape(name)}</li>"
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
    meanings = {
        "Most anomalous": "The highest scores of each set.",
        "Borderline": "The scores nearest to the threshold.",
        "Missed": "OOD images that are not flagged, the most normal of each set.",
        "False alarms": "Normal images that are flagged, the highest scores.",
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
        maps = found.attention_maps(detector, image[np.newaxis])
        wide = maps is not None
        picture = _picture(image, None if maps is None else maps[0])
        answer = evaluation.answers[name]
        verdict = "flagged" if answer["is_ood"][index] else "accepted"
        figures.append(
            f"<figure>{picture}<figcaption>{escaping.escape(name)} #{index}<br>"
            f"score {answer['ood_score'][index]:.3f}, p {answer['p_value'][index]:.2g}, {verdict}"
            "</figcaption></figure>"
        )
    width = "9.5rem" if wide else "6rem"
    note = (
        '<p class="soft"><small>Right: bright where the network looks.</small></p>' if wide else ""
    )
    return f'<div class="gallery" style="--w:{width}">{"".join(figures)}</div>{note}'


def _picture(image, attention):
    height, width = image.shape[:2]
    scale = min(1.0, _THUMBNAIL / max(height, width))
    if scale < 1.0:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = np.clip(np.round(image_ops.resize(image[np.newaxis], *size)[0]), 0, 255)
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
    """Pixels `(H, W, 3 or 4)` in 0-255 as the address of a PNG that holds them."""
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
