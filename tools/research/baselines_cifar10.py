r"""Baselines for docs/results.md, on the same images and with the same network as the method.

    python -m tools.research.baselines_cifar10 --data_dir=TFDS --auxiliary_exclude=FILE \
        --baseline=rotation --steps=2400 --sets=test --output_dir=results

- `pixels`: distance to the nearest bank image, after PCA of the pixels to 64 dimensions.
- `untrained`: the features of the network with its initial weights.
- `rotation`: the network trained to predict by how many quarter turns an image was rotated.

Writes `BASELINE-SEED.json` in the format of `reproduce_cifar10`, with `--standardize`
`BASELINE-standardized-SEED.json`.

Reference: Gidaris et al., "Unsupervised representation learning by predicting image rotations",
arXiv 1803.07728.
"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from sddns_tf import image_ops
from tools.research import cifar10

BASELINES = ("pixels", "untrained", "rotation")


class PixelScorer:
    """A detector that scores by the distance to the nearest image in principal components."""

    def __init__(self, normal, bank_images):
        bank = normal.training[:bank_images]
        self._pca = PCA(64, random_state=0).fit(self._pixels(bank))
        self._bank = NearestNeighbors(n_neighbors=1).fit(self.features(bank))
        self.threshold = np.inf
        calibration = self.predict(normal.calibration)["ood_score"]
        self.threshold = float(np.quantile(calibration, 0.95))

    def predict(self, images, batch_size=None, verbose=0):
        """Return the OOD score and decision of each image."""
        del batch_size, verbose
        scores = self._bank.kneighbors(self.features(images))[0][:, 0]
        return {"ood_score": scores, "is_ood": scores > self.threshold}

    def features(self, images):
        """Return the principal components of images, `(N, 64)`."""
        return self._pca.transform(self._pixels(images))

    def _pixels(self, images):
        return np.asarray(images).reshape(len(images), -1) / 255.0


def rotated(batch):
    """Return normalized images, flipped and rotated at random, and their quarter turns."""
    turns = tf.random.uniform([tf.shape(batch)[0]], 0, 4, tf.int32)
    batch = tf.image.random_flip_left_right(batch)
    every = tf.stack([tf.image.rot90(batch, k) for k in range(4)], axis=1)
    return image_ops.normalize(tf.gather(every, turns, batch_dims=1)), turns


def make_rotation_model(settings):
    """Return the compiled backbone with a layer that predicts the quarter turns."""
    model = keras.Sequential([cifar10.backbone(settings), keras.layers.Dense(4)])
    model.compile(
        cifar10.optimizer(settings, settings.steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def main(argv=None):
    """Run one baseline, unless its result exists."""
    parser = cifar10.parser(__doc__)
    parser.add_argument("--baseline", default="untrained", choices=BASELINES)
    parser.add_argument("--standardize", action="store_true", help="features, by the bank")
    settings = parser.parse_args(argv)

    if settings.standardize and settings.baseline == "pixels":
        parser.error("--standardize is for features. Received: --baseline=pixels")
    standardized = "-standardized" if settings.standardize else ""
    name = f"{settings.baseline}{standardized}-{settings.seed}"

    def measure():
        normal = cifar10.read_normal(settings)
        training = {"steps": 0, "images": 0, "seconds": 0.0, "history": {}}
        if settings.baseline == "pixels":
            scorer = PixelScorer(normal, settings.bank_images)
            features_of = scorer.features
        else:
            keras.utils.set_random_seed(settings.seed)
            backbone = cifar10.backbone(settings)
            if settings.baseline == "rotation":
                model, training = cifar10.fit(
                    settings,
                    name,
                    lambda: make_rotation_model(settings),
                    lambda first: cifar10.training_batches(
                        settings, normal.training, first_batch=first
                    ).map(rotated),
                    resume=False,
                )
                backbone = model.layers[0]
            scorer = cifar10.detector_of(settings, backbone, normal, settings.standardize)
            features_of = cifar10.features_with(scorer.extractor)
        ood = cifar10.read_ood(settings, normal)
        return {
            "flags": {**cifar10.flags_of(settings), "strategy": settings.baseline},
            **training,
            **cifar10.evaluate(scorer, normal, ood, features_of),
        }

    cifar10.record_run(settings, name, measure)


if __name__ == "__main__":
    main()
