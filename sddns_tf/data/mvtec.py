"""Sets for inspection in the layout of MVTec AD: good parts, damaged ones, and masks of the damage.

bottle/train/good/000.png
bottle/test/good/000.png
bottle/test/broken_large/000.png
bottle/ground_truth/broken_large/000_mask.png
"""

import dataclasses
import pathlib

import numpy as np

from sddns_tf.image_ops import RESIZES, center_crop
from sddns_tf.validation import check_choice, check_size

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
GOOD = "good"


@dataclasses.dataclass
class Inspection:
    """Images of one kind of part.

    Attributes:
        train: Good parts to train on, uint8 `(N, H, W, 3)`.
        test: Dict from the name of a folder of `test` to its images, uint8 `(M, H, W, 3)`;
            `"good"` are good parts.
        masks: Dict from each of these names to masks of the damage, bool `(M, H, W)`.
        files: Dict from each of these names to the paths of the images.
    """

    train: np.ndarray
    test: dict
    masks: dict
    files: dict


def load(folder, image_size):
    """Read a folder in the layout of MVTec AD.

    Args:
        folder: The folder of one kind of part, which holds `train`, `test` and `ground_truth`.
        image_size: Size to which images and masks are resized, an int or (height, width).

    Returns:
        `Inspection`.

    Raises:
        ValueError: If a folder or a mask is missing, or a mask has another size than its image.

    Example:
    >>> parts = sddns_tf.data.mvtec.load("mvtec/bottle", image_size=224)
    >>> parts.test["broken_large"].shape, parts.masks["broken_large"].shape
    ((20, 224, 224, 3), (20, 224, 224))

    Reference:
        Bergmann et al., "MVTec AD", CVPR 2019.
    """
    size, root = check_size("image_size", image_size), pathlib.Path(folder)
    files = {path.name: image_paths(path) for path in _folders(root / "test")}
    masks = {
        name: masks_of(paths, None if name == GOOD else root / "ground_truth" / name, size)
        for name, paths in files.items()
    }
    return Inspection(
        train=_read(image_paths(root / "train" / GOOD), size),
        test={name: _read(paths, size) for name, paths in files.items()},
        masks=masks,
        files=files,
    )


def masks_of(paths, folder, size, resize="squash"):
    """Return the masks of some images.

    Args:
        paths: Paths of the images.
        folder: Where their masks are: of `000.png` it is `000_mask.png` or `000.png`. None for
            images without damage.
        size: Height and width to which they are resized; a pixel is damaged where half of it is.
        resize: `"squash"` or `"crop"`, as the images were brought to it: see `data.load`.

    Returns:
        NumPy bool `(N, height, width)`.

    Raises:
        ValueError: If one is missing or has another size than its image.
    """
    check_choice("resize", resize, RESIZES)
    if folder is None:
        return np.zeros((len(paths), *size), bool)
    return np.stack(
        [_mask(pathlib.Path(path), pathlib.Path(folder), size, resize) for path in paths]
    )


def _mask(path, folder, size, resize):
    from PIL import Image

    found = [
        folder / f"{path.stem}{ending}{suffix}"
        for ending in ("_mask", "")
        for suffix in (path.suffix, ".png")
    ]
    found = next((name for name in found if name.is_file()), None)
    if found is None:
        raise ValueError(f"The mask of {path} is missing. Received: a folder {folder} without it")
    with Image.open(found) as mask, Image.open(path) as image:
        if mask.size != image.size:
            raise ValueError(
                "A mask must have its image's size. Received: "
                f"{found} of {mask.size}, {path} of {image.size} (width, height)"
            )
        damage = np.where(np.asarray(mask.convert("L")) > 0, np.uint8(255), np.uint8(0))
        if resize == "crop":
            damage = center_crop(damage[np.newaxis, ..., np.newaxis], *size)[0, ..., 0]
        resized = Image.fromarray(damage).resize(size[::-1], Image.Resampling.BOX)
        return np.asarray(resized) >= 128


def image_paths(folder):
    """Sorted paths of the images that lie in a folder."""
    folder = pathlib.Path(folder)
    found = [path for path in _listed(folder) if path.suffix.lower() in _EXTENSIONS]
    if not found:
        raise ValueError(f"There are no images in the folder. Received: {folder}")
    return found


def _folders(folder):
    return [path for path in _listed(folder) if path.is_dir()]


def _listed(folder):
    if not folder.is_dir():
        raise ValueError(
            "A set in the layout of MVTec AD has folders train/good, test/<kind> and "
            f"ground_truth/<kind>. Received: {folder}, which is no folder"
        )
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read(paths, size):
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
            images.append(np.asarray(resized))
    return np.stack(images)
