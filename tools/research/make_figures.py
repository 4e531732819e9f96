r"""Draws the documentation's pictures of views and shifts, with photographs from scikit-image.

    python -m tools.research.make_figures --growth=docs/results/speed/growth.json \
        --output_dir=docs/images

Writes shifts.png (each shift applied to photographs) and views.png (global and local views). With
--growth=PATH, the file that `tools.benchmark --benchmarks=growth --json=PATH` wrote, also writes
growth.svg.
"""

import argparse
import json
import pathlib

import numpy as np
import skimage.data
import tensorflow as tf
from matplotlib.figure import Figure
from PIL import Image

from sddns_tf import MultiCrop, files, image_ops, plots, shifts

SIDE = 96


def photographs():
    """Return four photographs, uint8 `(4, SIDE, SIDE, 3)`."""
    found = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    found.append(np.repeat(skimage.data.brick()[:256, :256, np.newaxis], 3, axis=-1))
    squares = []
    for image in found:
        side = min(image.shape[:2])
        left = (image.shape[1] - side) // 2
        square = image[np.newaxis, :side, left : left + side].astype(np.float32)
        squares.append(np.clip(image_ops.resize(square, SIDE, SIDE), 0, 255))
    return np.concatenate(squares).round().astype(np.uint8)


def shifted(images, seed):
    """Return images and titles: each shift applied to the photographs."""
    rows, titles = [], []
    for index, name in enumerate(shifts.NAMES):
        shift = shifts.get(name)
        rows.append(np.asarray(shift(tf.constant(images), [seed, index])))
        titles += [name] * len(images)
    return np.concatenate(rows), titles


def views(image, seed):
    """Return images and titles: a photograph and views of it as used in training."""
    crops = MultiCrop(SIDE, local_views=4)
    batch = tf.constant(image[np.newaxis])
    drawn = [crops(batch, seed=[seed, step]) for step in range(2)]
    found, titles = [image], ["photograph"]
    for one in drawn:
        for kind, group in zip(("global", "local"), one, strict=True):
            for pixels in image_ops.resize(group[:, 0], SIDE, SIDE):
                found.append(np.clip(pixels, 0, 255).round().astype(np.uint8))
                titles.append(f"{kind} view")
    return np.stack(found), titles


def save_small(figure, path):
    """Write a figure of photographs as a PNG file with 256 colors, which is a third of the size."""
    plots.save(figure, path)
    with Image.open(path) as picture, files.replacing(path) as unfinished:
        picture.convert("RGB").quantize(256).save(unfinished, format="PNG", optimize=True)


def growth(records):
    """Plot seconds per step, measured and expected from the number of multiplications."""
    figure = Figure(figsize=(9, 2.8), dpi=150, layout="constrained")
    settings = [dict(part.rsplit(" ", 1) for part in r["name"].split(", ")[1:]) for r in records]
    names = list(settings[0])
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        rows = [0] + [i for i, one in enumerate(settings) if one[name] != settings[0][name]]
        values = [int(settings[i][name]) for i in rows]
        axes.plot(values, [records[i]["ours"] for i in rows], "o-", label="measured")
        expected = [records[i]["theirs"] for i in rows]
        axes.plot(values, expected, "s--", color="0.5", label="multiplications")
        axes.set(xlabel=name.replace("_", " "), yscale="log", xticks=values)
        axes.tick_params(axis="x", rotation=45)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds per step")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def main(argv=None):
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="docs/images", help="folder to write to")
    parser.add_argument("--growth", help="JSON of the benchmark `growth`")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    settings = parser.parse_args(argv)
    folder = pathlib.Path(settings.output_dir)
    images = photographs()
    found, titles = shifted(images, settings.seed)
    save_small(plots.contact_sheet(found, titles=titles, columns=8), folder / "shifts.png")
    found, titles = views(images[0], settings.seed)
    save_small(plots.contact_sheet(found, titles=titles, columns=7), folder / "views.png")
    if settings.growth:
        records = json.loads(pathlib.Path(settings.growth).read_text())
        plots.save(growth(records), folder / "growth.svg")
    print(f"Written to {folder}")


if __name__ == "__main__":
    main()
