"""Use your own backbone: any Keras model that maps normalized images to one vector each.

    python examples/custom_backbone.py
    python examples/custom_backbone.py --backbones=mobilenet_v3 --steps=200

Trains four backbones for a few steps on crops of grass, and makes a detector from each: a network
of six lines, MobileNetV3 from `keras.applications`, a ResNetV2 from KerasCV and a DINOv2 from
KerasHub. The last two are skipped unless they are installed (`pip install -e ".[keras-cv]"`, `pip
install keras-hub`). Prints the number of parameters, the feature length, the training time, and the
AUROC of grass against gravel. All start from random weights, and nothing is downloaded. After so
few steps the figures show that each backbone works, not which is best.

Takes about two minutes on two CPU cores. The photographs come with scikit-image
(`pip install -e ".[examples]"`).
"""

import importlib.util
import time

import keras
import numpy as np
import skimage.data
from absl import app, flags

import sddns_tf
from sddns_tf import metrics

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "backbones", ["own", "mobilenet_v3", "keras_cv", "keras_hub"], "Names, separated by commas."
)
flags.DEFINE_integer("steps", 20, "Training steps per backbone.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Random seed.")

IMAGE_SIZE = 56
BATCH_SIZE = 16


def own():
    """Return two convolutions. With `None` as height and width they take views of any size."""
    images = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(32, 4, strides=4, activation="gelu")(images)
    x = keras.layers.Conv2D(64, 3, padding="same", activation="gelu")(x)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x))


def mobilenet_v3():
    """Return a network from `keras.applications` without its classification layer.

    Images are already normalized, so its own preprocessing is switched off. `SelfDistillation`
    makes sure that batch normalization only sees positives.
    """
    return keras.applications.MobileNetV3Small(
        input_shape=(None, None, 3),
        include_top=False,
        include_preprocessing=False,
        weights=None,
        pooling="avg",
    )


def keras_cv():
    """Return a backbone from KerasCV with its feature map averaged."""
    from keras_cv.models import ResNetV2Backbone

    images = keras.Input((None, None, 3))
    backbone = ResNetV2Backbone(
        stackwise_filters=[32, 64],
        stackwise_blocks=[2, 2],
        stackwise_strides=[1, 2],
        include_rescaling=False,
        input_shape=(None, None, 3),
    )
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(backbone(images)))


def keras_hub():
    """Return DINOv2 from KerasHub with the class token as feature. It takes only one image size."""
    from keras_hub.models import DINOV2Backbone

    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    backbone = DINOV2Backbone(
        patch_size=14,
        num_layers=3,
        hidden_dim=96,
        num_heads=3,
        intermediate_dim=384,
        image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
        position_embedding_shape=(IMAGE_SIZE, IMAGE_SIZE),
        use_mask_token=False,
    )
    return keras.Model(images, backbone(images)[:, 0])


# A function that makes each backbone, and the number of local views, which are smaller images.
BACKBONES = {
    "own": (own, 2),
    "mobilenet_v3": (mobilenet_v3, 2),
    "keras_cv": (keras_cv, 2),
    "keras_hub": (keras_hub, 0),
}


def crops(name, rows, count, generator):
    """Return crops of a photograph between two rows, uint8 `(count, 56, 56, 3)`."""
    photo = getattr(skimage.data, name)()
    tops = generator.integers(rows[0], rows[1] - IMAGE_SIZE + 1, count)
    lefts = generator.integers(0, photo.shape[1] - IMAGE_SIZE + 1, count)
    squares = [
        photo[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y, x in zip(tops, lefts, strict=True)
    ]
    return np.repeat(np.stack(squares)[..., np.newaxis], 3, axis=-1)


def train(backbone, local_views, images):
    """Return a model trained with rotated images as negatives."""
    model = sddns_tf.SelfDistillation(
        backbone=backbone,
        views=sddns_tf.MultiCrop(IMAGE_SIZE, local_views=local_views),
        negatives=sddns_tf.Negatives("rot90", source="in_distribution"),
        head=sddns_tf.ProjectionHead(num_prototypes=256, hidden_dim=128, bottleneck_dim=64),
        seed=FLAGS.seed,
    )
    model.compile(keras.optimizers.AdamW(1e-3))
    batches = sddns_tf.data.load(images, batch_size=BATCH_SIZE, shuffle=True, drop_remainder=True)
    model.fit(batches.repeat(), steps_per_epoch=FLAGS.steps, shuffle=False, verbose=2)
    return model


def main(argv):
    """Train and test each backbone."""
    del argv
    unknown = set(FLAGS.backbones) - set(BACKBONES)
    if unknown:
        raise app.UsageError(f"--backbones must be from {list(BACKBONES)}. Received: {unknown}")
    generator = np.random.default_rng(FLAGS.seed)
    training = crops("grass", (0, 300), 400, generator)
    calibration, test = (crops("grass", (300, 512), 100, generator) for _ in range(2))
    gravel = crops("gravel", (0, 512), 100, generator)

    lines = [f"{'backbone':16}{'parameters':>12}{'feature':>9}{'seconds':>9}{'AUROC':>8}"]
    for name in FLAGS.backbones:
        library = {"keras_cv": "keras-cv", "keras_hub": "keras-hub"}.get(name)
        if library and importlib.util.find_spec(name) is None:
            lines.append(f"{name:16}skipped: needs `pip install {library}`")
            continue
        print(f"Training {name}")
        keras.utils.set_random_seed(FLAGS.seed)
        make, local_views = BACKBONES[name]
        start = time.perf_counter()
        model = train(make(), local_views, training)
        seconds = time.perf_counter() - start
        backbone = model.teacher_backbone
        detector = sddns_tf.Detector.from_images(
            backbone,
            bank_images=training,
            calibration_images=calibration,
            image_size=IMAGE_SIZE,
            standardize=model.standardizes_features,
            verbose=0,
        )
        scores = [detector.predict(x, verbose=0)["ood_score"] for x in (test, gravel)]
        auroc = metrics.ood_metrics(*scores)["auroc"]
        lines.append(
            f"{name:16}{backbone.count_params():12,}{backbone.output_shape[-1]:9}"
            f"{seconds:9.0f}{auroc:8.3f}"
        )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    app.run(main)
