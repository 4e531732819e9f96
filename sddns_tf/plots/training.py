"""Curves of the values logged during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from collections.abc import Mapping

import numpy as np

from sddns_tf.plots.style import figure_of, line_style, wrapped


def training_curves(history: Any) -> Figure:
    """Draw what happened during training, one panel per quantity.

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
    panels: dict[Any, dict[str, Any]] = {}
    for name, values in curves.items():
        quantity = "loss" if name.endswith("loss") else name.removeprefix("val_")
        panels.setdefault((quantity, len(values)), {})[name] = values
    # The panel of losses spans the first row, the others follow, three to a row.
    wide = [panel for panel in panels if panel[0] == "loss"]
    small = [panel for panel in panels if panel[0] != "loss"]
    columns = max(1, min(3, len(small)))
    small_rows = -(-len(small) // columns)

    figure = figure_of(9.0, 2.7 * len(wide) + 2.3 * small_rows)
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
            **line_style(index),
        )
    width = 110 if quantity == "loss" else 36  # in characters, of the panel
    title = quantity if len(curves) > 1 else next(iter(curves))
    title = wrapped(title.replace("_", " "), width)
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
    axes.set_xlabel(wrapped("\n".join(notes), width), fontsize=9)
    margin = max(0.5, 0.02 * len(steps))
    axes.set_xlim(1 - margin, len(steps) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    # In full on each tick, because a separate power of ten would collide with the legend.
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.8g}"))
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _curves(history):
    if not isinstance(history, Mapping) or not history:
        raise ValueError(
            "`history` must be a dict from a name to one number per epoch, as in "
            f"`fit(...).history`. Received: {type(history).__name__}: {history!r:.80}."
        )
    curves = {str(name): np.asarray(values, "float64") for name, values in history.items()}
    for name, values in curves.items():
        if values.ndim != 1 or not len(values):
            raise ValueError(
                f"`history[{name!r}]` must hold one number per epoch, shape (epochs,). "
                f"Received: shape {values.shape}."
            )
    return curves
