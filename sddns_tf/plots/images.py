"""Pictures of images: contact sheets, and the network's attention over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sddns_tf.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

import textwrap

import numpy as np

from sddns_tf.metrics import as_scores
from sddns_tf.plots.style import figure_of, wrapped


def contact_sheet(
    images: Array,
    scores: Array | None = None,
    titles: Any = None,
    columns: int = 8,
    title: str | None = None,
) -> Figure:
    """Draw images in a grid, in the order given, each with its title and score.

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
    images = checked_images(images)
    captions = captions_of(images, scores, titles)
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1. Received: {columns}.")
    columns = min(columns, len(images))
    width, height = _grid_size(images, captions, columns)
    title = wrapped(title or "", int(10 * width))
    figure = figure_of(width, height + _title_height(title))
    _draw_grid(figure, images, captions, columns, title)
    return figure


def most_and_least_anomalous(images: Array, scores: Array, count: int = 8) -> Figure:
    """Draw a contact sheet of the images with the lowest and the highest scores.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, B at least 2.
        scores: Their OOD scores, `(B,)`, higher meaning more out-of-distribution.
        count: Largest number of images to show at each end; never more than half of all.

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
            f"Received: {len(images)} and {len(scores)}."
        )
    if count < 1:
        raise ValueError(f"`count` must be at least 1. Received: {count}.")
    order = np.argsort(scores, kind="stable")
    count = min(count, len(order) // 2)
    columns = min(count, 8)
    ends = {
        "Least anomalous (lowest scores)": order[:count],
        "Most anomalous (highest scores)": order[::-1][:count],
    }
    shown = [checked_images(images[chosen]) for chosen in ends.values()]
    captions = [captions_of(shown[0], scores[chosen], None) for chosen in ends.values()]
    width, height = _grid_size(shown[0], captions[0], columns)
    titles = [wrapped(title, int(10 * width)) for title in ends]
    figure = figure_of(width, sum(height + _title_height(title) for title in titles))
    parts: Any = figure.subfigures(2, 1)
    for part, end, lines, title in zip(parts, shown, captions, titles, strict=True):
        _draw_grid(part, end, lines, columns, title)
    return figure


def attention_overlay(images: Array, attention: Array, per_head: bool = False) -> Figure:
    """Draw where the network looks: attention of the CLS token over the image.

    One row per image: the image, then the mean attention over heads and, with `per_head`, the
    attention of each head. Every map is scaled from its own lowest to its own highest value.

    Args:
        images: uint8 or float in 0-255, `(B, H, W, 3)`, with the aspect ratio of the
            network's input; they may have more pixels than the network saw.
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
    images = checked_images(images)
    heads = _cls_attention(images, attention)
    maps = heads.mean(axis=1, keepdims=True)
    names = ["Image", "Mean of heads"]
    if per_head:
        maps = np.concatenate([maps, heads], axis=1)
        names += [f"Head {index + 1}" for index in range(heads.shape[1])]

    rows, height, width = images.shape[:3]
    figure = figure_of(1.5 * len(names) + 0.8, 1.5 * rows * height / width + 0.45)
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
    bar: Any = figure.colorbar(
        overlay, ax=grid, ticks=[0, 1], fraction=share, pad=share, aspect=12 * rows
    )
    bar.ax.set_yticklabels(["least\nattention", "most\nattention"], fontsize=8)
    bar.solids.set_alpha(1)
    return figure


def checked_images(images: Array) -> np.ndarray:
    """Check images to show, and return them as uint8 `(B, H, W, 3)`."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            "`images` must have shape (B, H, W, 3), with B, H and W at least 1. "
            f"Received: shape {images.shape}."
        )
    if images.dtype == np.uint8:
        return images
    images = images.astype("float32")
    low, high = images.min(), images.max()
    # Bicubic resampling overshoots 0-255 a little. Values that all lie within a few units of zero
    # are normalized or in 0-1, and would show as black.
    if not (low >= -32 and high <= 287) or (low != high and high <= 3):
        raise ValueError(
            f"`images` must be in 0-255. Received: values from {low:.4g} to {high:.4g}."
        )
    return np.clip(np.round(images), 0, 255).astype("uint8")


def captions_of(images: Array, scores: Array, titles: Any) -> list[str]:
    """Return the lines above each image: at most two for the title, one for the score."""
    captions: list[list[str]] = [[] for _ in images]
    for name, given in (("titles", titles), ("scores", scores)):
        if given is not None and len(given) != len(images):
            raise ValueError(
                f"`{name}` must have one entry for each of the {len(images)} images. "
                f"Received: {len(given)}."
            )
    if titles is not None:
        for lines, text in zip(captions, titles, strict=True):
            lines += textwrap.wrap(str(text), 17, max_lines=2, placeholder="…") or [""]
    if scores is not None:
        for lines, score in zip(captions, as_scores(scores), strict=True):
            lines.append(f"{score:#.4g}".rstrip("."))
    return ["\n".join(lines) for lines in captions]


def _grid_size(images, captions, columns):
    """Return the width and height in inches of a grid of images with their captions."""
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
            # Two dollar signs in a name of a file are no formula.
            axes.set_title(caption, fontsize=7, pad=2, parse_math=False)
    if title:
        figure.suptitle(title, fontsize=10)


def _title_height(title):
    return 0.18 * (title.count("\n") + 1) + 0.1 if title else 0.0


def _cls_attention(images, attention):
    """Return the CLS token's attention to the patches, as maps `(B, heads, rows, columns)`."""
    attention = np.asarray(attention)
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(
            "`attention` must have shape (B, heads, 1 + N, 1 + N). "
            f"Received: shape {attention.shape}."
        )
    if len(attention) != len(images):
        raise ValueError(
            "`attention` must have one entry for each image. "
            f"Received: {len(attention)} for {len(images)} images."
        )
    height, width = images.shape[1:3]
    patches = attention.shape[2] - 1
    rows = round((patches * height / width) ** 0.5)
    columns = round((patches * width / height) ** 0.5)
    if patches < 1 or attention.shape[1] < 1 or rows * columns != patches:
        raise ValueError(
            f"`attention` must hold a CLS token and square patches that tile the {height} x "
            f"{width} image. Received: {patches} patches in shape {attention.shape}."
        )
    maps = attention[:, :, 0, 1:].astype("float32")
    if not (np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1.01):
        raise ValueError(
            "`attention` must hold probabilities, after the softmax. "
            f"Received: values from {maps.min():.4g} to {maps.max():.4g}."
        )
    return maps.reshape(*maps.shape[:2], rows, columns)
