"""Pictures of anomaly maps, drawn against the threshold on one scale for all images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sddns_tf.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

import numpy as np

from sddns_tf.plots.images import captions_of, checked_images
from sddns_tf.plots.style import figure_of

_YELLOW, _RED = np.array([240, 228, 66]), np.array([213, 20, 0])


def overlay(
    image: Array, anomaly_map: Array, threshold: float | None, lowest: float = -22.5
) -> np.ndarray:
    """Return an image with the places above the threshold painted over.

    Needs only NumPy and Pillow.

    The scale is the same for all images, and nothing below the threshold is painted, so a normal
    image stays as it is. Above the threshold the color goes from yellow to red, which is reached at
    twice the threshold's distance from the bank's places. Flagged places are outlined.

    Args:
        image: uint8 or float in 0-255, `(H, W, 3)`.
        anomaly_map: Scores of its places, float `(h, w)`.
        threshold: Score above which a place is flagged: `Detector.threshold`.
        lowest: Score of what is in the bank: `Detector.lowest_score`. The default is right for a
            detector with the default temperature and offset.

    Returns:
        uint8 array `(H, W, 3)`.

    Raises:
        ValueError: If shapes do not fit or the threshold is not a number above `lowest`.

    Example:
    >>> out = detector.predict(images)
    >>> picture = sddns_tf.plots.overlay(images[0], out["anomaly_map"][0], detector.threshold)
    """
    image = checked_images(np.asarray(image)[np.newaxis])[0]
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


def anomaly_map(
    images: Array,
    maps: Array,
    threshold: float | None,
    lowest: float = -22.5,
    titles: Any = None,
    masks: Array | None = None,
) -> Figure:
    """Draw images, their anomaly maps and overlays of both, relative to the threshold.

    Every map is drawn on the same scale: white at the threshold, blue below it down to what is in
    the bank, red above it up to twice as far. So the map of a normal image is blue all over, and
    maps of different images, in different figures of one detector, can be compared.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`.
        maps: Scores of places, float `(B, h, w)`: the detector's `anomaly_map`.
        threshold: Score above which a place is flagged: `Detector.threshold`.
        lowest: Score of what is in the bank: `Detector.lowest_score`.
        titles: One string per image.
        masks: True where there is known damage, bool `(B, H, W)`; adds a column.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If shapes do not fit or the threshold is not a number above `lowest`.

    Example:
    >>> out = detector.predict(images)
    >>> figure = sddns_tf.plots.anomaly_map(images, out["anomaly_map"], detector.threshold)
    """
    images, maps = checked_images(images), np.asarray(maps)
    heat = _heat(maps, threshold, lowest)
    captions = captions_of(images, None, titles)
    if len(images) != len(maps) or (masks is not None and len(masks) != len(images)):
        raise ValueError(
            "There must be one map, and one mask, for each image. Received: "
            f"{len(images)} images, {len(maps)} maps, {None if masks is None else len(masks)} masks"
        )
    names = ["Image", "Map", "Flagged", *([] if masks is None else ["Known"])]
    rows, height, width = images.shape[:3]
    figure = figure_of(1.5 * len(names) + 1.1, 1.6 * rows * height / width + 0.45)
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


def _heat(maps, threshold, lowest):
    """Return maps on the scale of pictures: 0 in the bank, 1 at the threshold, 2 twice as far."""
    if maps.ndim != 3 or 0 in maps.shape or np.isnan(maps).any():
        raise ValueError(
            "`maps` must be scores of places, (B, h, w). "
            f"Received: shape={maps.shape}, {np.isnan(maps).sum()} of them no numbers"
        )
    if threshold is None or not (np.isfinite(threshold) and threshold > lowest):
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
    """Return where all four neighbors belong to the mask as well."""
    padded = np.pad(mask, 1, constant_values=True)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
