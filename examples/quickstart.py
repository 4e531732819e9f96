"""Texture inspection in a few minutes: train on normal images only, flag what is not normal.

    python examples/quickstart.py

The normal images are crops of two photographs, grass and brick. Training sees no labels and no
anomalies. The result is tested on gravel, the brick wall rotated by 90 degrees, cells and tissue.
All photographs come with scikit-image (`pip install -e ".[examples]"`); nothing is downloaded.

Prints a table of AUROCs after two to three minutes on two free CPU cores, then two baselines
(nearest neighbor on pixels, the untrained network), and writes pictures, the trained model and the
detector to `--output_dir`. `--without_negatives` also trains the same network without negatives,
for as long again.
"""

from sddns_tf.cli import starting

starting.import_tensorflow()  # without its messages, with oneDNN

import pathlib
import sys
import time

import keras
import numpy as np
import skimage.color
import skimage.data
import sklearn.neighbors
from absl import app, flags

import sddns_tf
from sddns_tf import image_ops, metrics, plots, schedules

FLAGS = flags.FLAGS
flags.DEFINE_string("output_dir", "quickstart_output", "Where pictures, model and detector go.")
flags.DEFINE_integer("steps", 300, "Training steps with negatives.", lower_bound=10)
flags.DEFINE_integer("seed", 0, "Fixes crops, weights, views and negatives.")
flags.DEFINE_bool("without_negatives", False, "Train without negatives too, as a baseline.")

FALSE_POSITIVE_RATE = 0.05
BATCH_SIZE = 64
CROP_SIZE, IMAGE_SIZE = 64, 32
# These rows of each photograph calibrate and test; those above and below them train.
HELD_OUT_ROWS = (176, 336)
BANK_SIZE = 5_000
# Of the images that negatives are made from.
NORMAL_SHARE = 0.1
EPOCHS = 10
# A step without negatives takes about half the time of one with.
STEPS_WITHOUT_NEGATIVES = 2
AUXILIARY_PHOTOGRAPHS = (
    "astronaut", "camera", "chelsea", "clock", "coffee", "coins", "hubble_deep_field", "moon",
    "page", "retina", "rocket", "stereo_motorcycle", "text",
)  # fmt: skip


def photograph(name):
    """Return a photograph of scikit-image in gray, uint8 `(H, W)`."""
    pixels = getattr(skimage.data, name)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    if pixels.ndim == 3:
        pixels = np.round(255 * skimage.color.rgb2gray(pixels)).astype(np.uint8)
    return pixels


def crops(photo, count, generator, size=CROP_SIZE):
    """Return random square crops, resized to `IMAGE_SIZE`: uint8 `(count, 32, 32, 3)`."""
    size = min(size, *photo.shape)
    tops = generator.integers(0, photo.shape[0] - size + 1, count)
    lefts = generator.integers(0, photo.shape[1] - size + 1, count)
    squares = [photo[y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)]
    images = np.repeat(np.stack(squares)[..., np.newaxis], 3, axis=-1)
    return np.round(image_ops.resize(images, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8)


def with_ordinary_light(images, generator):
    """Give images brightness and contrast in the range of textures, so that structure counts."""
    images = images.astype(np.float32)
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    contrast = images.std(axis=(1, 2, 3), keepdims=True) + 4.0
    new_mean = generator.uniform(90, 150, mean.shape)
    new_contrast = generator.uniform(20, 45, mean.shape)
    adjusted = (images - mean) / contrast * new_contrast + new_mean
    return np.clip(adjusted, 0, 255).astype(np.uint8)


def make_data(generator):
    """Training, calibration, test and auxiliary images, and the OOD sets by name."""
    normal = [photograph("grass"), photograph("brick")]
    top, bottom = HELD_OUT_ROWS
    held_out = [photo[top:bottom] for photo in normal]
    training = [part for photo in normal for part in (photo[:top], photo[bottom:])]

    def mix(photos, count):
        parts = [crops(photo, count // len(photos), generator) for photo in photos]
        return generator.permutation(np.concatenate(parts))

    # Crops of several sizes, so that the auxiliary images have coarse and fine structure.
    auxiliary = [
        crops(photograph(name), 400, generator, size)
        for name in AUXILIARY_PHOTOGRAPHS
        for size in (64, 128, 192, 256)
    ]
    auxiliary = with_ordinary_light(np.concatenate(auxiliary), generator)
    training_images = mix(training, 20_000)
    # A few normal images among them, so that rotated ones are negatives as well. Not half, as with
    # source="both": grass turned is still grass, and what contradicts itself blurs its features.
    count = int(NORMAL_SHARE / (1 - NORMAL_SHARE) * len(auxiliary))
    auxiliary = np.concatenate([auxiliary, training_images[:count]])
    return {
        "training": training_images,
        "calibration": mix(held_out, 1_000),
        "test": mix(held_out, 1_000),
        "auxiliary": generator.permutation(auxiliary),
        "ood": {
            "gravel": crops(photograph("gravel"), 500, generator),
            "brick, rotated": crops(np.rot90(held_out[1]), 500, generator),
            "cell": crops(photograph("cell"), 500, generator),
            "tissue": crops(photograph("immunohistochemistry"), 500, generator),
        },
    }


def make_backbone():
    """Return a small convolutional network.

    Any Keras model from images to one vector each would do.

    Textures are local and minutes are short: convolutions learn them sooner than attention. The
    feature is the mean and spread of each channel of the last layer, and of the first, because
    normalization takes the images' light and contrast out of the others.
    """

    def spread(x):
        return keras.ops.sqrt(keras.ops.var(x, axis=(1, 2)) + 1e-4)

    layers = keras.layers
    images = keras.Input((None, None, 3))
    x = first = layers.Conv2D(32, 3, padding="same")(images)
    for width in (64, 128):
        x = layers.Activation("gelu")(layers.GroupNormalization(8)(x))
        x = layers.Conv2D(width, 3, strides=2, padding="same")(x)
    x = layers.Activation("gelu")(layers.GroupNormalization(8)(x))
    mean = layers.GlobalAveragePooling2D()
    return keras.Model(
        images, layers.Concatenate()([mean(first), spread(first), mean(x), spread(x)])
    )


def train(data, steps, negatives):
    """A `SelfDistillation` trained for `steps`, what it logged, and the seconds that took."""
    keras.utils.set_random_seed(FLAGS.seed)
    model = sddns_tf.SelfDistillation(
        backbone=make_backbone(),
        # The light of an inspection line does not change: no color jitter.
        views=sddns_tf.MultiCrop(IMAGE_SIZE, local_views=0, color_jitter=0),
        negatives=negatives,
        head=sddns_tf.ProjectionHead(
            num_prototypes=512, hidden_dim=256, bottleneck_dim=64, norm_last_layer=False
        ),
        teacher_temperature=0.05,
        teacher_momentum=0.98,
        # Negatives from the first step on make all outputs uniform: their weight ramps up.
        negative_weight=schedules.Linear(0.0, 0.5, int(0.3 * steps), int(0.1 * steps)),
        seed=FLAGS.seed,
    )
    learning_rate = schedules.WarmupCosine(3e-3, 1e-5, steps, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(learning_rate, weight_decay=0.04))
    batches = sddns_tf.data.load(
        data["training"], batch_size=BATCH_SIZE, shuffle=True, drop_remainder=True
    ).repeat()
    if negatives is not None:
        auxiliary = sddns_tf.data.load(data["auxiliary"], batch_size=BATCH_SIZE, shuffle=True)
        batches = sddns_tf.data.with_auxiliary(batches, auxiliary)
    start = time.perf_counter()
    history = model.fit(
        batches,
        steps_per_epoch=steps // EPOCHS,
        epochs=EPOCHS,
        callbacks=[sddns_tf.callbacks.CollapseMonitor()],
        shuffle=False,  # the data set does it
        verbose=1 if sys.stdout.isatty() else 2,
    )
    return model, history.history, time.perf_counter() - start


def make_detector(backbone, data):
    return sddns_tf.Detector.from_images(
        backbone,
        bank_images=data["training"][:BANK_SIZE],
        calibration_images=data["calibration"],
        false_positive_rate=FALSE_POSITIVE_RATE,
        k=1,  # the nearest image of the bank
        standardize=True,  # so that each channel counts
        image_size=IMAGE_SIZE,
        verbose=0,
    )


def detector_score(detector):
    """Function from images to OOD scores."""
    return lambda images: detector.predict(images, verbose=0)["ood_score"]


def pixel_score(data):
    """Distance to the nearest training image, pixel by pixel: a baseline that learns nothing."""
    neighbors = sklearn.neighbors.NearestNeighbors(n_neighbors=1, algorithm="brute")
    neighbors.fit(data["training"][:BANK_SIZE, ..., 0].reshape(BANK_SIZE, -1).astype(np.float32))
    return lambda images: neighbors.kneighbors(images[..., 0].reshape(len(images), -1))[0][:, 0]


def score_all(score, data):
    """OOD scores of all sets, from a function from images to scores."""
    return {
        "calibration": score(data["calibration"]),
        "test": score(data["test"]),
        "ood": {name: score(images) for name, images in data["ood"].items()},
    }


def print_table(method, scores):
    """A method on every OOD set; `flagged` at the threshold that the calibration images set."""
    columns = ("auroc", "aupr_in", "aupr_out", "fpr95", "flagged")
    threshold = np.quantile(scores["calibration"], 1 - FALSE_POSITIVE_RATE, method="higher")
    print(f"\n{method:34}" + "".join(f"{column:>10}" for column in columns))
    rows = []
    for name, ood_scores in scores["ood"].items():
        figures = metrics.ood_metrics(scores["test"], ood_scores)
        figures["flagged"] = np.mean(ood_scores > threshold)
        rows.append([figures[column] for column in columns])
        print(f"  {name:32}" + "".join(f"{value:10.3f}" for value in rows[-1]))
    print(f"  {'mean':32}" + "".join(f"{value:10.3f}" for value in np.mean(rows, axis=0)))
    flagged = np.mean(scores["test"] > threshold)
    print(f"  {'fresh normal images':72}{flagged:10.3f}  (asked: {FALSE_POSITIVE_RATE})")


def write_pictures(detector, scores, data, history, output_dir):
    """Histograms, ROC curves, training curves, and the most and least anomalous images."""
    normal, ood = scores["test"], scores["ood"]
    everything = np.concatenate([data["test"], *data["ood"].values()])
    all_scores = np.concatenate([normal, *ood.values()])
    figures = {
        "score_histograms": plots.score_histograms(normal, ood, threshold=detector.threshold),
        "roc_curves": plots.roc_curves(normal, ood),
        "training_curves": plots.training_curves(history),
        "most_and_least_anomalous": plots.most_and_least_anomalous(everything, all_scores),
        "training_images": plots.contact_sheet(data["training"][:16], title="Training images"),
        "auxiliary_images": plots.contact_sheet(data["auxiliary"][:16], title="Auxiliary images"),
    }
    for name, figure in figures.items():
        plots.save(figure, output_dir / f"{name}.png")


def print_baselines(data):
    """What the same table says without our training, or without negatives."""
    print_table("nearest neighbor on pixels", score_all(pixel_score(data), data))
    keras.utils.set_random_seed(FLAGS.seed)
    untrained = detector_score(make_detector(make_backbone(), data))
    print_table("untrained backbone", score_all(untrained, data))
    if FLAGS.without_negatives:
        steps = FLAGS.steps * STEPS_WITHOUT_NEGATIVES
        print(f"\nTraining without negatives, {steps} steps")
        plain, _, seconds = train(data, steps, negatives=None)
        score = detector_score(make_detector(plain.teacher_backbone, data))
        print_table(f"without negatives ({seconds:.0f} s)", score_all(score, data))


def main(argv):
    """Train, detect, compare, write."""
    del argv
    start = time.perf_counter()
    output_dir = pathlib.Path(FLAGS.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    data = make_data(np.random.default_rng(FLAGS.seed))

    print(f"Training with negatives, {FLAGS.steps} steps")
    negatives = sddns_tf.Negatives("rot90", source="auxiliary")
    model, history, seconds = train(data, FLAGS.steps, negatives)
    detector = make_detector(model.teacher_backbone, data)
    scores = score_all(detector_score(detector), data)
    print_table(f"with negatives ({seconds:.0f} s)", scores)
    write_pictures(detector, scores, data, history, output_dir)
    model.save(output_dir / "model.keras")
    detector.save(output_dir / "detector.keras")
    print(
        f"\nIn {output_dir.resolve()}: the pictures (*.png), model.keras to train on, "
        f"detector.keras to use. {time.perf_counter() - start:.0f} s so far."
    )
    print("\nBaselines:")
    print_baselines(data)


if __name__ == "__main__":
    app.run(main)
