"""Use published DINO weights as a detector, without any training or after further training.

    sddns convert-dino --checkpoint=dino_deitsmall16_pretrain.pth \
        --output=dino_vits16.weights.h5
    python examples/pretrained_dino.py --weights=dino_vits16.weights.h5

The first command converts a checkpoint that you have downloaded; it needs PyTorch. The second makes
a detector from it, with the features of normal images as the bank: an image whose feature is far
from all of them is out of distribution. With `--finetune_steps=200` the network is first trained a
little further, with negatives. Prints the AUROC of crops of grass against other textures. With the
folders `--good` and `--check`, it prints the p-values of the images in `--check` instead.

    python examples/pretrained_dino.py

Without `--weights`, random weights are used, just to see that the example runs. That takes about a
minute on two CPU cores. The photographs come with scikit-image (`pip install -e ".[examples]"`).
"""

import keras
import numpy as np
from absl import app, flags

import sddns_tf
from sddns_tf import metrics, schedules

FLAGS = flags.FLAGS
flags.DEFINE_string("weights", None, "Weights from `sddns convert-dino`.")
flags.DEFINE_enum("preset", "vit_small", ["vit_tiny", "vit_small", "vit_base"], "Network.")
flags.DEFINE_integer("patch_size", 16, "Side of the patches in pixels.")
flags.DEFINE_integer("image_size", 96, "Side in pixels to which images are resized.")
flags.DEFINE_integer("finetune_steps", 0, "Training steps.", lower_bound=0)
flags.DEFINE_string("good", None, "Folder of normal images.")
flags.DEFINE_string("check", None, "Folder of images to check.")
flags.DEFINE_integer(
    "count", 200, "Number of crops of each photograph, if there are no folders.", lower_bound=20
)
flags.DEFINE_integer("seed", 0, "Random seed.")

TRAINED_AT = 224
BATCH_SIZE = 16


def make_backbone():
    """Return the published network.

    Its position embedding is resampled for images of other sizes.
    """
    make = getattr(sddns_tf, FLAGS.preset)
    backbone = make(image_size=TRAINED_AT, patch_size=FLAGS.patch_size)
    if FLAGS.weights:
        backbone.load_weights(FLAGS.weights)
    else:
        print("No --weights: using random weights")
    return backbone


def finetune(backbone, images):
    """Return the model that trained a pretrained network further, with a low learning rate."""
    steps = FLAGS.finetune_steps
    model = sddns_tf.SelfDistillation(
        backbone=backbone,
        views=sddns_tf.MultiCrop(FLAGS.image_size, local_views=2),
        negatives=sddns_tf.Negatives("perm16", source="in_distribution"),
        negative_weight=schedules.Linear(0.0, 0.5, steps),
        seed=FLAGS.seed,
    )
    model.compile(keras.optimizers.AdamW(schedules.WarmupCosine(2e-5, 1e-6, steps)))
    batches = sddns_tf.data.load(images, batch_size=BATCH_SIZE, shuffle=True, drop_remainder=True)
    model.fit(batches.repeat(), steps_per_epoch=steps, shuffle=False, verbose=2)
    return model


def crops(name, rows, generator):
    """Return crops of a scikit-image photograph between two rows, uint8 `(N, 96, 96, 3)`."""
    import skimage.data

    photo = getattr(skimage.data, name)()
    tops = generator.integers(rows[0], rows[1] - 96 + 1, FLAGS.count)
    lefts = generator.integers(0, photo.shape[1] - 96 + 1, FLAGS.count)
    squares = [photo[y : y + 96, x : x + 96] for y, x in zip(tops, lefts, strict=True)]
    return np.repeat(np.stack(squares)[..., np.newaxis], 3, axis=-1)


def load(folder):
    return sddns_tf.data.load_arrays(
        f"folder:{folder}", image_size=FLAGS.image_size, on_error="skip"
    )


def main(argv):
    """Make a detector from a pretrained network and try it."""
    del argv
    if bool(FLAGS.good) != bool(FLAGS.check):
        raise app.UsageError(
            "--good and --check must be given together. Received: only one of them"
        )
    keras.utils.set_random_seed(FLAGS.seed)
    generator = np.random.default_rng(FLAGS.seed)
    if FLAGS.good:
        normal = generator.permutation(load(FLAGS.good))
        training, calibration = np.split(normal, [int(0.8 * len(normal))])
    else:
        training = crops("grass", (0, 300), generator)
        calibration = crops("grass", (300, 512), generator)

    backbone, standardize = make_backbone(), False
    if FLAGS.finetune_steps:
        model = finetune(backbone, training)
        backbone, standardize = model.teacher_backbone, model.standardizes_features
    detector = sddns_tf.Detector.from_images(
        backbone,
        training,
        calibration,
        image_size=FLAGS.image_size,
        standardize=standardize,
        k=20,
    )
    if FLAGS.good:
        answers = detector.predict(load(FLAGS.check))
        files = sddns_tf.data.image_files(FLAGS.check, on_error="skip")
        for i in np.argsort(-answers["ood_score"]):
            print(f"{answers['p_value'][i]:.3f}  {files[i]}")
        return
    scores = detector.predict(crops("grass", (300, 512), generator))["ood_score"]
    for name in ("gravel", "brick", "cell"):
        other = detector.predict(crops(name, (0, 512), generator))["ood_score"]
        print(f"grass against {name}: AUROC {metrics.ood_metrics(scores, other)['auroc']:.3f}")


if __name__ == "__main__":
    app.run(main)
