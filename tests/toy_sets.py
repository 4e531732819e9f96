"""Prepared TFDS sets of tiny photographs, for tests of what reads sets by their names."""

import itertools

import numpy as np
import skimage.data


def tiles(photograph, count, side):
    """Squares of a photograph of scikit-image, row by row, uint8 `(count, side, side, 3)`."""
    pixels = getattr(skimage.data, photograph)()
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., np.newaxis], 3, axis=-1)
    rows, columns = (length // side for length in pixels.shape[:2])
    corners = itertools.islice(itertools.product(range(rows), range(columns)), count)
    return np.stack(
        [pixels[side * y : side * (y + 1), side * x : side * (x + 1)] for y, x in corners]
    )


def write_tfds(root, name, side=None, version="1.0.0", config=None, **splits):
    """A prepared TFDS set of two classes; with `side=None` it states no size of its images."""
    import tensorflow_datasets as tfds

    folder = root / name / (config or "") / version
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=str(folder),
        module_name="",
        config_name=config,
    )
    features = {
        "image": tfds.features.Image(shape=(side, side, 3)),
        "label": tfds.features.ClassLabel(names=["even", "odd"]),
    }
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=200)
    writer.initialize_splits(list(splits))
    for split, images in splits.items():
        rows = [{"image": image, "label": i % 2} for i, image in enumerate(images)]
        writer.add_examples({split: rows})
    writer.close_all()
