"""Pictures of scores, images, attention and training.

Every function returns a `matplotlib.figure.Figure` that belongs to no `pyplot` window, so it
works on a server and leaves no global state behind. Colours are those of Okabe and Ito, which
remain distinct under every common form of colour blindness.
"""

import os
import pathlib
import textwrap
import uuid
from collections.abc import Mapping

import numpy as np

from sddns_tf.metrics import as_scores, ood_metrics

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
# Okabe and Ito's yellow is left out: a thin yellow line cannot be seen on white.
LINE_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")
_YELLOW, _RED = np.array([240, 228, 66]), np.array([213, 20, 0])
SCORE_LABEL = "OOD score (higher: more out-of-distribution)"


def save(figure, path):
    """Writes a figure to a file, whole or not at all.

    The picture is written beside its destination and renamed when complete, so an interrupted
    run leaves an earlier file as it was. Missing folders are created.

    Args:
        figure: A `matplotlib.figure.Figure`.
        path: Where to write. The suffix gives the format: `.png`, `.pdf`, `.svg`, ...

    Returns:
        The path as a `pathlib.Path`.

    Raises:
        ValueError: if the suffix is no format that matplotlib writes.

    Example:
    >>> sddns_tf.plots.save(sddns_tf.plots.training_curves(history.history), "curves.png")
    """
    path = pathlib.Path(path)
    file_format = path.suffix[1:].lower()
    formats = sorted(figure.canvas.get_supported_filetypes())
    if file_format not in formats:
        raise ValueError(
            f"`path` must end in one of {', '.join('.' + name for name in formats)}. "
            f"Received {str(path)!r}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        figure.savefig(unfinished, format=file_format, dpi="figure")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def score_histograms(id_scores, ood_scores, threshold=None):
    """Histograms of the scores of normal images against each out-of-distribution set.

    One row per set, all on one axis of scores, with the in-distribution scores repeated in each.
    Every histogram is scaled to its own peak, so that sets of any size and spread can be
    compared. Where scores have long tails the axis stops short of them: scores beyond it are
    counted in the outermost bins, and a note says how many there are.

    Args:
        id_scores: Scores of in-distribution images, `(N,)`, higher meaning more
            out-of-distribution.
        ood_scores: Dict from the name of a set to its scores, `(M,)`.
        threshold: Score from which images are flagged. Adds a line and the share flagged.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no set, scores are not one-dimensional, empty or not finite, or
            the threshold is not finite.

    Example:
    >>> scores = {"textures": detector.predict(textures)["ood_score"]}
    >>> figure = sddns_tf.plots.score_histograms(
    ...     detector.predict(normal)["ood_score"], scores, threshold=-3.5)
    """
    id_scores, ood_scores = _score_sets(id_scores, ood_scores)
    if threshold is not None and not np.isfinite(threshold):
        raise ValueError(f"`threshold` must be a finite number. Received {threshold}.")
    everything = np.concatenate([id_scores, *ood_scores.values()])
    low, high = _score_limits([id_scores, *ood_scores.values()])
    bins = np.linspace(low, high, 61)

    figure = _figure(7.0, 1.25 + 1.05 * len(ood_scores))
    rows = figure.subplots(len(ood_scores), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, scores) in zip(rows, ood_scores.items(), strict=True):
        for values, color, label in (
            (id_scores, BLUE, "in-distribution"),
            (scores, VERMILION, "out-of-distribution"),
        ):
            counts, _ = np.histogram(np.clip(values, low, high), bins)
            axes.stairs(counts / counts.max(), bins, fill=True, color=color, alpha=0.3)
            axes.stairs(counts / counts.max(), bins, color=color, linewidth=1.2, label=label)
        facts = f"AUROC {ood_metrics(id_scores, scores)['auroc']:.3f}"
        if threshold is not None:
            facts += f", {np.mean(scores >= threshold):.0%} flagged"
            if low <= threshold <= high:
                axes.axvline(threshold, color=BLACK, linewidth=1, linestyle="--", label="threshold")
        axes.set_title(_wrapped(f"{name}  ({facts})", 88), loc="left", fontsize=9)
        axes.set(xlim=(low, high), ylim=(0, 1.08), yticks=[])
        axes.spines[["left", "top", "right"]].set_visible(False)
    rows[-1].set_xlabel(SCORE_LABEL)
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)

    notes = ["Each histogram is scaled to its own peak."]
    beyond = np.count_nonzero((everything < low) | (everything > high))
    if beyond:
        notes.append(
            f"Long tails: {beyond} of {everything.size} scores lie beyond the axis "
            "and are counted in its outermost bins."
        )
    if threshold is not None:
        share = f"{np.mean(id_scores >= threshold):.1%} of in-distribution images"
        notes.append(f"The threshold {threshold:.4g} flags {share}.")
        if not low <= threshold <= high:
            notes.append(f"It lies {'left' if threshold < low else 'right'} of the axis.")
    figure.supxlabel(_wrapped(" ".join(notes), 105), fontsize=8, color="0.35")
    return figure


def roc_curves(id_scores, ood_scores):
    """Receiver operating characteristic of each out-of-distribution set, AUROC in the legend.

    Args:
        id_scores: Scores of in-distribution images, `(N,)`, higher meaning more
            out-of-distribution.
        ood_scores: Dict from the name of a set to its scores, `(M,)`.

    Returns:
        A `matplotlib.figure.Figure`. Flagged out-of-distribution images are the true positives.

    Raises:
        ValueError: if there is no set, or scores are not one-dimensional, empty or not finite.

    Example:
    >>> figure = sddns_tf.plots.roc_curves(normal_scores, {"textures": texture_scores})
    """
    from sklearn.metrics import roc_curve

    id_scores, ood_scores = _score_sets(id_scores, ood_scores)
    labels = [
        _wrapped(f"{ood_metrics(id_scores, scores)['auroc']:.3f}  {name}", 64)
        for name, scores in ood_scores.items()
    ]
    lines = 2 + sum(label.count("\n") + 1 for label in labels)
    figure = _figure(5.4, 5.1 + 0.17 * lines)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="0.500  chance")
    for index, (scores, label) in enumerate(zip(ood_scores.values(), labels, strict=True)):
        is_ood = np.repeat([0, 1], [id_scores.size, scores.size])
        false_positives, true_positives, _ = roc_curve(is_ood, np.concatenate([id_scores, scores]))
        axes.plot(false_positives, true_positives, label=label, linewidth=1.6, **_line(index))
    axes.set(
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
        xlabel="In-distribution images flagged (false positive rate)",
        ylabel="Out-of-distribution images flagged (true positive rate)",
    )
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[1:] + handles[:1],
        labels[1:] + labels[:1],
        title="AUROC",
        alignment="left",
        loc="outside lower center",
        frameon=False,
        fontsize=9,
    )
    return figure


def contact_sheet(images, scores=None, titles=None, columns=8, title=None):
    """Images in a grid, in the order given, each with its title and score.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`.
        scores: OOD scores to print above the images, `(B,)`.
        titles: One string per image. Long ones are cut to two lines.
        columns: Images per row.
        title: Title of the sheet.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if shapes do not fit, images are outside 0-255 or `columns` is below 1.

    Example:
    >>> figure = sddns_tf.plots.contact_sheet(images, scores=out["ood_score"], title="Line 3")
    """
    images = _images(images)
    captions = _captions(images, scores, titles)
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1. Received {columns}.")
    columns = min(columns, len(images))
    width, height = _grid_size(images, captions, columns)
    title = _wrapped(title or "", int(10 * width))
    figure = _figure(width, height + _title_height(title))
    _draw_grid(figure, images, captions, columns, title)
    return figure


def most_and_least_anomalous(images, scores, count=8):
    """Contact sheet of the images with the lowest and the highest scores.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, B at least 2.
        scores: Their OOD scores, `(B,)`, higher meaning more out-of-distribution.
        count: Images to show at each end, at most; never more than half of the images.

    Returns:
        A `matplotlib.figure.Figure`: the least anomalous images above, the lowest score first,
        and the most anomalous below, the highest score first.

    Raises:
        ValueError: if shapes do not fit, there are fewer than two images, images are outside
            0-255 or `count` is below 1.

    Example:
    >>> figure = sddns_tf.plots.most_and_least_anomalous(images, out["ood_score"], count=16)
    """
    images = np.asarray(images)
    scores = as_scores(scores)
    if len(scores) != len(images) or len(images) < 2:
        raise ValueError(
            "`images` and `scores` must have the same length, at least 2. "
            f"Received {len(images)} and {len(scores)}."
        )
    if count < 1:
        raise ValueError(f"`count` must be at least 1. Received {count}.")
    order = np.argsort(scores, kind="stable")
    count = min(count, len(order) // 2)
    columns = min(count, 8)
    ends = {
        "Least anomalous (lowest scores)": order[:count],
        "Most anomalous (highest scores)": order[::-1][:count],
    }
    shown = [_images(images[chosen]) for chosen in ends.values()]
    captions = [_captions(shown[0], scores[chosen], None) for chosen in ends.values()]
    width, height = _grid_size(shown[0], captions[0], columns)
    titles = [_wrapped(title, int(10 * width)) for title in ends]
    figure = _figure(width, sum(height + _title_height(title) for title in titles))
    parts = figure.subfigures(2, 1)
    for part, end, lines, title in zip(parts, shown, captions, titles, strict=True):
        _draw_grid(part, end, lines, columns, title)
    return figure


def attention_overlay(images, attention, per_head=False):
    """Where the network looks: attention of the CLS token over the image.

    One row per image: the image, then the attention averaged over heads and, if asked, that of
    each head. Every map is scaled from its own lowest to its own highest value.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, of the network's proportions; they may
            have more pixels than the network saw.
        attention: Softmax attention of the last block, `(B, heads, 1 + N, 1 + N)`, CLS token
            first, then the N patches row by row.
        per_head: Whether to add one map per head.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if shapes do not fit, N patches cannot tile the image with squares, or values
            are out of range.

    Example:
    >>> figure = sddns_tf.plots.attention_overlay(images[:4], attention[:4], per_head=True)

    Reference:
        - [Caron et al., DINO, figure 1](https://arxiv.org/abs/2104.14294)
    """
    images = _images(images)
    heads = _cls_attention(images, attention)
    maps = heads.mean(axis=1, keepdims=True)
    names = ["Image", "Mean of heads"]
    if per_head:
        maps = np.concatenate([maps, heads], axis=1)
        names += [f"Head {index + 1}" for index in range(heads.shape[1])]

    rows, height, width = images.shape[:3]
    figure = _figure(1.5 * len(names) + 0.8, 1.5 * rows * height / width + 0.45)
    grid = figure.subplots(rows, len(names), squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    for row, image, row_maps in zip(grid, images, maps, strict=True):
        row[0].imshow(image)
        luma = image @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
        for axes, attended in zip(row[1:], row_maps, strict=True):
            axes.imshow(luma, cmap="gray", vmin=0, vmax=255)
            spread = np.ptp(attended)
            shown = (attended - attended.min()) / spread if spread else np.zeros_like(attended)
            overlay = axes.imshow(
                shown,
                cmap="inferno",
                vmin=0,
                vmax=1,
                alpha=0.6,
                interpolation="bilinear",
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
    for axes in grid.flat:
        axes.set_axis_off()
    share = 0.12 / figure.get_figwidth()
    bar = figure.colorbar(
        overlay, ax=grid, ticks=[0, 1], fraction=share, pad=share, aspect=12 * rows
    )
    bar.ax.set_yticklabels(["least\nattention", "most\nattention"], fontsize=8)
    bar.solids.set_alpha(1)
    return figure


def overlay(image, anomaly_map, threshold, lowest=-22.5):
    """An image with what lies above the threshold painted over it. Needs NumPy and Pillow only.

    One scale holds for all images, and nothing below the threshold is painted: a normal image stays
    as it is. From the threshold on the paint goes from yellow to red, which is reached twice as far
    from the bank's places as the threshold is. A line runs around the flagged places.

    Args:
        image: uint8 or float in 0-255, `(H, W, 3)`.
        anomaly_map: Scores of its places, float `(h, w)`.
        threshold: Score above which a place is flagged: `Detector.threshold`.
        lowest: Score of what is in the bank, `Detector.lowest_score`, which the default is for a
            detector's own temperature and offset.

    Returns:
        uint8 array `(H, W, 3)`.

    Raises:
        ValueError: If shapes do not fit or the threshold is not a number above `lowest`.

    Example:
    >>> out = detector.predict(images)
    >>> picture = sddns_tf.plots.overlay(images[0], out["anomaly_map"][0], detector.threshold)
    """
    image = _images(np.asarray(image)[np.newaxis])[0]
    (heat,) = _heat(np.asarray(anomaly_map)[np.newaxis], threshold, lowest)
    height, width = image.shape[:2]
    smooth = _resized(heat, (height, width), "bilinear")
    flagged = _resized(heat, (height, width), "nearest") > 1.0
    strength = np.clip(smooth - 1.0, 0.0, 1.0)[..., np.newaxis]
    color = (1.0 - strength) * _YELLOW + strength * _RED
    opacity = np.where(smooth[..., np.newaxis] > 1.0, 0.35 + 0.3 * strength, 0.0)
    painted = np.round((1.0 - opacity) * image + opacity * color).astype("uint8")
    painted[flagged & ~_inside(flagged)] = _RED
    return painted


def anomaly_map(images, maps, threshold, lowest=-22.5, titles=None, masks=None):
    """Images, their anomaly maps and both in one, against the threshold.

    Every map is drawn on the same scale: white at the threshold, blue below it down to what is in
    the bank, red above it up to twice as far. So a map of a normal image is blue all over, and
    those of different images, and of different figures of one detector, can be compared.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`.
        maps: Scores of places, float `(B, h, w)`: the detector's `anomaly_map`.
        threshold: Score above which a place is flagged: `Detector.threshold`.
        lowest: Score of what is in the bank: `Detector.lowest_score`.
        titles: One string per image.
        masks: True where damage is known to be, bool `(B, H, W)`; adds a column.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If shapes do not fit or the threshold is not a number above `lowest`.

    Example:
    >>> out = detector.predict(images)
    >>> figure = sddns_tf.plots.anomaly_map(images, out["anomaly_map"], detector.threshold)
    """
    images, maps = _images(images), np.asarray(maps)
    heat = _heat(maps, threshold, lowest)
    captions = _captions(images, None, titles)
    if len(images) != len(maps) or (masks is not None and len(masks) != len(images)):
        raise ValueError(
            "There must be one map, and one mask, for each image. Received: "
            f"{len(images)} images, {len(maps)} maps, {None if masks is None else len(masks)} masks"
        )
    names = ["Image", "Map", "Flagged", *([] if masks is None else ["Known"])]
    rows, height, width = images.shape[:3]
    figure = _figure(1.5 * len(names) + 1.1, 1.6 * rows * height / width + 0.45)
    grid = figure.subplots(rows, len(names), squeeze=False)
    for index, row in enumerate(grid):
        row[0].imshow(images[index])
        row[0].set_ylabel(captions[index], fontsize=7)
        shown = row[1].imshow(heat[index], cmap="RdBu_r", vmin=0.0, vmax=2.0)
        row[2].imshow(overlay(images[index], maps[index], threshold, lowest))
        if masks is not None:
            row[3].imshow(masks[index], cmap="gray", vmin=0, vmax=1)
        for axes, name in zip(row, names, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if not index:
                axes.set_title(name, fontsize=9)
    share = 0.12 / figure.get_figwidth()
    bar = figure.colorbar(shown, ax=grid, ticks=[0, 1, 2], fraction=share, pad=share, aspect=30)
    bar.ax.set_yticklabels(["in the bank", "threshold", "twice as far"], fontsize=8)
    return figure


def training_curves(history):
    """What happened during training, one panel per quantity.

    All losses share the first panel, and a quantity and its `val_` twin share one. A quantity
    measured less often than the others is drawn against the count of its evaluations. Values
    that are not finite leave a gap, and a note says where they begin.

    Args:
        history: Dict from a name (`loss`, `positive_loss`, `negative_loss`, `teacher_entropy`,
            `feature_std`, `learning_rate`, ...) to one number per epoch: `fit(...).history`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no curve, or a curve is empty or not one-dimensional.

    Example:
    >>> history = model.fit(images, epochs=10)
    >>> figure = sddns_tf.plots.training_curves(history.history)
    """
    curves = _curves(history)
    epochs = max(len(values) for values in curves.values())
    panels = {}
    for name, values in curves.items():
        quantity = "loss" if name.endswith("loss") else name.removeprefix("val_")
        panels.setdefault((quantity, len(values)), {})[name] = values
    # The panel of losses spans the first row, the others follow three abreast.
    wide = [panel for panel in panels if panel[0] == "loss"]
    small = [panel for panel in panels if panel[0] != "loss"]
    columns = max(1, min(3, len(small)))
    small_rows = -(-len(small) // columns)

    figure = _figure(9.0, 2.7 * len(wide) + 2.3 * small_rows)
    layout = figure.add_gridspec(
        len(wide) + small_rows, columns, height_ratios=[1.2] * len(wide) + [1.0] * small_rows
    )
    cells = [layout[row, :] for row in range(len(wide))]
    cells += [layout[len(wide) + i // columns, i % columns] for i in range(len(small))]
    for cell, panel in zip(cells, wide + small, strict=True):
        x_label = "epoch" if panel[1] == epochs else "evaluation"
        _draw_curves(figure.add_subplot(cell), panel[0], panels[panel], x_label)
    return figure


def _draw_curves(axes, quantity, curves, x_label):
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    notes = [x_label]
    for index, (name, values) in enumerate(curves.items()):
        steps = np.arange(1, len(values) + 1)
        finite = np.isfinite(values)
        if not finite.all():
            notes.append(f"{name}: not finite from {steps[~finite][0]}")
        axes.plot(
            steps,
            np.where(finite, values, np.nan),
            label=name,
            linewidth=1.6,
            marker="o" if finite.sum() == 1 else None,
            **_line(index),
        )
    width = 110 if quantity == "loss" else 36  # in characters, of the panel
    title = quantity if len(curves) > 1 else next(iter(curves))
    title = _wrapped(title.replace("_", " "), width)
    if len(curves) == 1:
        axes.set_title(title, loc="left", fontsize=10)
    else:
        axes.legend(
            title=title,
            title_fontsize=10,
            fontsize=8,
            ncols=max(1, width // (9 + max(map(len, curves)))),
            alignment="left",
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderpad=0.0,
            frameon=False,
        )
    axes.set_xlabel(_wrapped("\n".join(notes), width), fontsize=9)
    margin = max(0.5, 0.02 * len(steps))
    axes.set_xlim(1 - margin, len(steps) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    # In full on each tick: a power of ten set apart would collide with the legend.
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.8g}"))
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _heat(maps, threshold, lowest):
    """Maps on the scale of pictures: 0 is in the bank, 1 the threshold, 2 twice as far."""
    if maps.ndim != 3 or 0 in maps.shape or np.isnan(maps).any():
        raise ValueError(
            "`maps` must be scores of places, (B, h, w). "
            f"Received: shape={maps.shape}, {np.isnan(maps).sum()} of them no numbers"
        )
    if not (np.isfinite(threshold) and threshold > lowest):
        raise ValueError(
            "`threshold` must be a number above `lowest`, the score of what is in the bank. "
            f"Received: threshold={threshold}, lowest={lowest}"
        )
    return np.clip((maps.astype("float32") - lowest) / np.float32(threshold - lowest), 0.0, 1e3)


def _resized(values, size, method):
    from PIL import Image

    picture = Image.fromarray(np.asarray(values, "float32"))
    kind = Image.Resampling.BILINEAR if method == "bilinear" else Image.Resampling.NEAREST
    return np.asarray(picture.resize(size[::-1], kind))


def _inside(mask):
    """Where all four neighbors belong to a mask as well."""
    padded = np.pad(mask, 1, constant_values=True)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _line(index):
    style = LINE_STYLES[index // len(LINE_COLORS) % len(LINE_STYLES)]
    return {"color": LINE_COLORS[index % len(LINE_COLORS)], "linestyle": style}


def _wrapped(text, width):
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, width))


def _score_sets(id_scores, ood_scores):
    if not isinstance(ood_scores, Mapping) or not ood_scores:
        raise ValueError(
            "`ood_scores` must be a dict from a name to scores, with at least one entry. "
            f"Received {type(ood_scores).__name__}: {ood_scores!r:.80}."
        )
    sets = {
        str(name): as_scores(scores, f"ood_scores[{name!r}]") for name, scores in ood_scores.items()
    }
    return as_scores(id_scores, "id_scores"), sets


def _score_limits(sets):
    """Limits that show all of every set but its long tails.

    From the 5 and 95 % quantiles, outwards by the distance between them: 4.9 standard deviations
    of a normal distribution, which thus fits whole.
    """
    low, high = np.inf, -np.inf
    for scores in sets:
        first, last = np.quantile(scores, [0.05, 0.95])
        margin = last - first
        low = min(low, max(scores.min(), first - margin))
        high = max(high, min(scores.max(), last + margin))
    if low == high:
        margin = max(0.5, 1e-3 * abs(low))
        return low - margin, high + margin
    return low, high


def _images(images):
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            "`images` must have shape (B, H, W, 3), with B, H and W at least 1. "
            f"Received shape {images.shape}."
        )
    if images.dtype == np.uint8:
        return images
    images = images.astype("float32")
    low, high = images.min(), images.max()
    # Bicubic resampling overshoots 0-255 a little. Values that all lie within a few units of zero
    # are normalized or in 0-1, and would show as black.
    if not (low >= -32 and high <= 287) or (low != high and high <= 3):
        raise ValueError(
            f"`images` must be in 0-255. Received values from {low:.4g} to {high:.4g}."
        )
    return np.clip(np.round(images), 0, 255).astype("uint8")


def _captions(images, scores, titles):
    """The lines above each image: at most two of title, one of score."""
    captions = [[] for _ in images]
    for name, given in (("titles", titles), ("scores", scores)):
        if given is not None and len(given) != len(images):
            raise ValueError(
                f"`{name}` must have one entry for each of the {len(images)} images. "
                f"Received {len(given)}."
            )
    if titles is not None:
        for lines, text in zip(captions, titles, strict=True):
            lines += textwrap.wrap(str(text), 17, max_lines=2, placeholder="…") or [""]
    if scores is not None:
        for lines, score in zip(captions, as_scores(scores), strict=True):
            lines.append(f"{score:#.4g}".rstrip("."))
    return ["\n".join(lines) for lines in captions]


def _grid_size(images, captions, columns):
    """Width and height in inches of a grid of images with their captions."""
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 if caption else 0 for caption in captions)
    height = 1.15 * images.shape[1] / images.shape[2] + 0.13 * lines + 0.08
    return max(2.4, 1.2 * columns), rows * height + 0.05


def _draw_grid(figure, images, captions, columns, title):
    rows = -(-len(images) // columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption in zip(grid.flat, images, captions, strict=False):
        axes.imshow(image)
        if caption:
            axes.set_title(caption, fontsize=7, pad=2)
    if title:
        figure.suptitle(title, fontsize=10)


def _title_height(title):
    return 0.18 * (title.count("\n") + 1) + 0.1 if title else 0.0


def _cls_attention(images, attention):
    """The CLS token's attention to the patches, as maps `(B, heads, rows, columns)`."""
    attention = np.asarray(attention)
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(
            "`attention` must have shape (B, heads, 1 + N, 1 + N). "
            f"Received shape {attention.shape}."
        )
    if len(attention) != len(images):
        raise ValueError(
            "`attention` must have one entry for each image. "
            f"Received {len(attention)} for {len(images)} images."
        )
    height, width = images.shape[1:3]
    patches = attention.shape[2] - 1
    rows = round((patches * height / width) ** 0.5)
    columns = round((patches * width / height) ** 0.5)
    if patches < 1 or attention.shape[1] < 1 or rows * columns != patches:
        raise ValueError(
            f"`attention` must hold a CLS token and square patches that tile the {height} x "
            f"{width} image. Received {patches} patches in shape {attention.shape}."
        )
    maps = attention[:, :, 0, 1:].astype("float32")
    if not (np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1.01):
        raise ValueError(
            "`attention` must hold probabilities, after the softmax. "
            f"Received values from {maps.min():.4g} to {maps.max():.4g}."
        )
    return maps.reshape(*maps.shape[:2], rows, columns)


def _curves(history):
    if not isinstance(history, Mapping) or not history:
        raise ValueError(
            "`history` must be a dict from a name to one number per epoch, as in "
            f"`fit(...).history`. Received {type(history).__name__}: {history!r:.80}."
        )
    curves = {str(name): np.asarray(values, "float64") for name, values in history.items()}
    for name, values in curves.items():
        if values.ndim != 1 or not len(values):
            raise ValueError(
                f"`history[{name!r}]` must hold one number per epoch, shape (epochs,). "
                f"Received shape {values.shape}."
            )
    return curves
