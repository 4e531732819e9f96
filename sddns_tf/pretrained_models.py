"""Detectors that come with the package, trained, for a first try without training."""

import pathlib

import keras

from sddns_tf.detector import Detector  # noqa: F401  (registers the class for loading)

_FOLDER = pathlib.Path(__file__).parent / "trained"
NAMES = ("cifar10-small",)


def pretrained(name="cifar10-small"):
    """A trained and calibrated detector from inside the package.

    `"cifar10-small"`: a convolutional network of 32 channels trained on CIFAR-10's training images
    on one CPU core, with negatives of rotated auxiliary images, and a bank of 1,000 weighted
    centres. Calibrated at a false positive rate of 0.05 on 2,500 test images (of the first 5,000,
    every other one, from the first on). AUROC of 5,000 fresh test images against other sets, and
    their share flagged (of fresh CIFAR-10 images, 4.7 %):

    | | CIFAR-100 | DTD | GTSRB | MNIST | uniform noise |
    |---|---|---|---|---|---|
    | AUROC | 0.577 | 0.883 | 0.773 | 0.959 | 0.994 |

    docs/results.md has the commands that make it. It shows how a detector is used, and finds what
    looks very different; it is not a good one of its kind.

    Args:
        name: String, one of `NAMES`.

    Returns:
        A `Detector`, for images uint8 or float in 0-255, `(B, H, W, 3)`, best of 32 px.

    Raises:
        ValueError: If there is none of that name.

    Example:
    >>> detector = sddns_tf.pretrained("cifar10-small")
    >>> detector.predict(images)["p_value"]

    Reference:
        Rafiee et al., arXiv 2201.06378; Krizhevsky, "Learning multiple layers of features from
        tiny images", 2009.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {list(NAMES)}. Received: {name!r}")
    return keras.saving.load_model(_FOLDER / f"{name}.keras", compile=False)
