r"""Print how often nearest neighbors predict CIFAR-10's classes, to see if features are semantic.

    python -m tools.research.nearest_neighbors --data_dir=TFDS \
        --detector=sddns_tf/trained/cifar10-small.keras

The 20 nearest of 10,000 training images vote for the class of 2,500 test images. Distances are
between pixels (minus their mean), features of the network with its initial weights, and features of
the detector. Labels are used here and nowhere else.

Reference: the vote is DINO's, Caron et al., arXiv 2104.14294.
"""

import json

import keras
import numpy as np

from sddns_tf import features
from tools.research import cifar10


def main(argv=None):
    """Print the accuracies as JSON."""
    parser = cifar10.parser(__doc__)
    parser.add_argument("--detector", required=True, help="trained detector (.keras)")
    settings = parser.parse_args(argv)
    normal = cifar10.read_normal(settings)
    keras.utils.set_random_seed(settings.seed)
    untrained = features.FeatureExtractor(cifar10.backbone(settings), image_size=cifar10.SIDE)
    detector = keras.models.load_model(settings.detector)
    mean = normal.training.reshape(len(normal.training), -1).mean(0, dtype=np.float64)
    for name, features_of in {
        "pixels": lambda images: images.reshape(len(images), -1) - mean.astype(np.float32),
        "untrained": cifar10.features_with(untrained),
        "detector": cifar10.features_with(detector.extractor),
    }.items():
        accuracy = cifar10.nearest_neighbor_accuracy(normal, features_of, settings.bank_images)
        print(json.dumps({"features": name, "knn": round(accuracy, 4)}), flush=True)


if __name__ == "__main__":
    main()
