"""Real photographs that all tests share; they come inside scikit-image's wheel."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import skimage.data
from hypothesis import settings

# The same examples on every machine, and no limit that a slow one could miss.
settings.register_profile("sddns_tf", deadline=None, derandomize=True)
settings.load_profile("sddns_tf")


def _crops(photograph, count, size, seed):
    """`count` squares of `size` pixels at random places of one photograph."""
    generator = np.random.default_rng(seed)
    tops, lefts = (generator.integers(0, side - size, count) for side in photograph.shape[:2])
    crops = [
        photograph[top : top + size, left : left + size]
        for top, left in zip(tops, lefts, strict=True)
    ]
    return np.stack(crops)


@pytest.fixture(scope="session")
def photos():
    """Eight colour photographs, uint8 (8, 64, 64, 3)."""
    sources = (
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        skimage.data.coffee(),
        skimage.data.rocket(),
    )
    # Every second pixel, so that a crop shows more than one smooth patch.
    photos = np.concatenate(
        [_crops(source[::2, ::2], 2, 64, seed) for seed, source in enumerate(sources)]
    )
    photos.setflags(write=False)
    return photos


@pytest.fixture(scope="session")
def normal():
    """In-distribution images: one texture, uint8 (32, 32, 32, 3)."""
    brick = np.repeat(skimage.data.brick()[..., np.newaxis], 3, axis=-1)
    images = _crops(brick[::2, ::2], 32, 32, seed=0)
    images.setflags(write=False)
    return images


@pytest.fixture(scope="session")
def auxiliary():
    """Unrelated photographs of a higher resolution, uint8 (32, 48, 48, 3)."""
    images = np.concatenate(
        [
            _crops(skimage.data.chelsea(), 16, 48, seed=0),
            _crops(skimage.data.coffee(), 16, 48, seed=1),
        ]
    )
    images.setflags(write=False)
    return images
