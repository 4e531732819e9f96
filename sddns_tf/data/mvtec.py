"""Data sets in the layout of MVTec AD: good parts, damaged parts, and masks of the damage.

bottle/train/good/000.png
bottle/test/good/000.png
bottle/test/broken_large/000.png
bottle/ground_truth/broken_large/000_mask.png
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from sddns_tf import pictures
from sddns_tf.data.folder import Folder
from sddns_tf.data.pixels import Shaping
from sddns_tf.image_ops import RESIZES, center_crop
from sddns_tf.validation import check_choice, check_size

GOOD = "good"


@dataclasses.dataclass
class Inspection:
    """Images and masks of one kind of part.

    Attributes:
        train: Good parts to train on, uint8 `(N, H, W, 3)`.
        test: Dict from the name of a folder in `test` to its images, uint8 `(M, H, W, 3)`. The
            folder `"good"` has good parts.
        masks: Dict from each of these names to masks of the damage, bool `(M, H, W)`.
        files: Dict from each of these names to the paths of the images.
    """

    train: np.ndarray
    test: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    files: dict[str, list[pathlib.Path]]


def load(folder: str | os.PathLike, image_size: int | tuple[int, int]) -> Inspection:
    """Read a folder in the layout of MVTec AD.

    Args:
        folder: Folder of one kind of part, with the folders `train`, `test` and `ground_truth`.
        image_size: Size to which images and masks are resized, an int or (height, width).

    Returns:
        `Inspection`.

    Raises:
        ValueError: If a folder or mask is missing, an image cannot be read, or a mask differs in
            size from its image.

    Example:
    >>> parts = sddns_tf.data.mvtec.load("mvtec/bottle", image_size=224)
    >>> parts.test["broken_large"].shape, parts.masks["broken_large"].shape
    ((20, 224, 224, 3), (20, 224, 224))

    Reference:
        Bergmann et al., "MVTec AD", CVPR 2019.
    """
    size, root = check_size("image_size", image_size), pathlib.Path(folder).expanduser()
    test = {path.name: _read(path, size) for path in _folders(root / "test")}
    files = {name: paths for name, (paths, _) in test.items()}
    masks = {
        name: masks_of(paths, None if name == GOOD else root / "ground_truth" / name, size)
        for name, paths in files.items()
    }
    return Inspection(
        train=_read(root / "train" / GOOD, size)[1],
        test={name: images for name, (_, images) in test.items()},
        masks=masks,
        files=files,
    )


def masks_of(
    paths: Sequence[str | os.PathLike],
    folder: str | os.PathLike | None,
    size: tuple[int, int],
    resize: str = "squash",
) -> np.ndarray:
    """Return the masks of some images.

    Args:
        paths: Paths of the images.
        folder: Folder of their masks, drawn on images as their EXIF data turn them. The mask of
            `000.png` is `000_mask.png` or `000.png`. None for images without damage.
        size: Height and width to which masks are resized. A resized pixel counts as damaged if at
            least half of it is.
        resize: `"squash"` or `"crop"`, as for the images: see `data.load`.

    Returns:
        NumPy bool `(N, height, width)`.

    Raises:
        ValueError: If a mask is missing, is that of two images, or differs in size from its image.
    """
    check_choice("resize", resize, RESIZES)
    if folder is None:
        return np.zeros((len(paths), *size), bool)
    places = [_place(pathlib.Path(path), pathlib.Path(folder)) for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(
                f"Each image must have a mask of its own. Received: {place} for {path}"
            )
    return np.stack(
        [_mask(path, place, size, resize) for path, place in zip(paths, places, strict=True)]
    )


def _place(path, folder):
    """Return the path of an image's mask."""
    found = [
        folder / f"{path.stem}{ending}{suffix}"
        for ending in ("_mask", "")
        for suffix in (path.suffix, ".png")
    ]
    found = next((name for name in found if name.is_file()), None)
    if found is None:
        raise ValueError(
            f"The mask of {path} is missing. Received: {folder}, which does not have it"
        )
    return found


def _mask(path, found, size, resize):
    from PIL import Image

    with Image.open(found) as mask, Image.open(path) as image:
        shown = pictures.shown_size(image)
        if mask.size != shown:
            raise ValueError(
                "A mask must have its image's size. Received: "
                f"{found} of {mask.size}, {path} of {shown} (width, height)"
            )
        damage = np.where(np.asarray(mask.convert("L")) > 0, np.uint8(255), np.uint8(0))
        if resize == "crop":
            damage = center_crop(damage[np.newaxis, ..., np.newaxis], *size)[0, ..., 0]
        resized = Image.fromarray(damage).resize(size[::-1], Image.Resampling.BOX)
        return np.asarray(resized) >= 128


def _read(path, size):
    """Return the paths of the images in a folder, and the images as `data.load_arrays` reads them.

    Args:
        path: Path of the folder.
        size: Height and width.
    """
    folder = Folder(path, Shaping(size), pictures.MAX_PIXELS, "raise", exif_orientation=True)
    files, images = folder.read()
    return [pathlib.Path(file.path) for file in files], images


def _folders(folder):
    return [path for path in _listed(folder) if path.is_dir()]


def _listed(folder):
    if not folder.is_dir():
        raise ValueError(
            "A data set in the layout of MVTec AD must have the folders train/good, test/<kind> "
            f"and ground_truth/<kind>. Received: {folder}, which is not a folder"
        )
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
