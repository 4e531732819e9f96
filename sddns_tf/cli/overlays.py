"""Pictures of where images are anomalous, one for each file that `sddns score` reads."""

from __future__ import annotations

import errno
import pathlib
from collections.abc import Callable

import numpy as np

from sddns_tf import files
from sddns_tf.cli.console import say
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.scorers import Scorer


def writer(scorer: Scorer, folder: str) -> Callable[[str, np.ndarray, np.ndarray], None]:
    """Return a function that writes the overlay of one image.

    Args:
        scorer: `Scorer` of a local detector.
        folder: Folder to write to; created if it does not exist.

    Returns:
        Function that takes the path of an image file, its pixels as the scorer takes them, uint8
        `(H, W, 3)`, and its anomaly map, float `(h, w)`.

    Raises:
        UsageError: If the detector has no maps.
    """
    from PIL import Image

    from sddns_tf.plots.maps import overlay

    scale = scorer.map_scale
    if scale is None:
        raise UsageError("--maps needs the model of a local detector. Received: one without maps")
    with user_input("maps"):
        pathlib.Path(folder).expanduser().mkdir(parents=True, exist_ok=True)

    def write(path: str, image: np.ndarray, anomaly_map: np.ndarray) -> None:
        target = place(folder, path)
        if scale.crop_to is not None:
            image = cropped(image, *scale.crop_to)
        painted = overlay(image, anomaly_map, scale.threshold, scale.lowest)
        with user_input("maps", OSError):
            try:
                with files.replacing(target) as unfinished:
                    Image.fromarray(painted).save(unfinished, "png")
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                say(f"No map of {path}: its name, with .png added, is too long for a file")

    return write


def place(folder: str, path: str) -> pathlib.Path:
    """Return where the overlay of a file goes: `FOLDER/PATH.png`, always inside FOLDER."""
    parts = pathlib.Path(path).parts
    inside = [part for part in parts if part not in ("..", pathlib.Path(path).anchor)]
    target = pathlib.Path(folder).expanduser().joinpath(*inside)
    return target.with_name(f"{target.name}.png")


def cropped(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the largest central part with the given aspect ratio: see `image_ops.center_crop`."""
    rows, columns = image.shape[:2]
    new_rows = min(rows, max(1, columns * height // width))
    new_columns = min(columns, max(1, rows * width // height))
    top, left = (rows - new_rows) // 2, (columns - new_columns) // 2
    return np.ascontiguousarray(image[top : top + new_rows, left : left + new_columns])
