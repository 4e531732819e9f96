"""Industrial inspection: a folder of good parts, a folder to check, what looks wrong and where.

    python examples/folder_of_parts.py --good=photos/good --check=photos/new

Nothing but photographs of good parts is needed, 250 or more, all taken in the same way. A fifth of
them is held out to set the threshold; the others train. Where several photographs show one part,
give others to set the threshold, with `--calibration=photos/other_good_parts`: a part that trained
scores lower than a new one, and the threshold would be too low. Writes, to `--output_dir`,
`scores.csv` (the images of `--check`, the most suspicious first, with their p-values),
`most_suspicious.png`, which shows the places above the threshold, and `detector.keras`, which
`sddns export` and `sddns score` take.

The detector is a local one: of good parts at most `--false_positive_rate` show any such place.
Where something does not count, such as a serial number, `--ignore=mask.png` leaves it out.

    python examples/folder_of_parts.py

without folders makes some to try it on, under `--output_dir`: pieces of a brick wall, and to check
fresh pieces of which half have a scratch or a stain (the wall is a photograph of scikit-image,
`pip install -e ".[examples]"`; the damage is drawn). That takes about five minutes on two busy CPU
cores; of 100 damaged and 100 sound pieces it says how many it flagged, and how well the maps show
the damage: pixel AUROC, AUPRO up to 30 % false positives, and the share of a damaged region that is
flagged.
"""

from sddns_tf.cli import quiet

quiet.import_tensorflow()  # without its own messages

import csv
import pathlib

import keras
import numpy as np
from absl import app, flags

import sddns_tf
from sddns_tf import metrics, plots, schedules
from sddns_tf.data import mvtec

FLAGS = flags.FLAGS
flags.DEFINE_string("good", None, "Folder of photographs of good parts.")
flags.DEFINE_string("check", None, "Folder of photographs to check.")
flags.DEFINE_string(
    "calibration",
    None,
    "Folder of other good parts, to set the threshold. Default: some of --good.",
)
flags.DEFINE_string(
    "ignore", None, "Mask file for all photographs, not black where nothing counts."
)
flags.DEFINE_string("output_dir", "parts_output", "Where scores, picture and detector go.")
flags.DEFINE_integer("image_size", 64, "Side in pixels to which photographs are resized.")
flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=10)
flags.DEFINE_float("false_positive_rate", 0.05, "Largest share of good parts to flag.", 0.0, 1.0)
flags.DEFINE_integer("seed", 0, "Fixes all that is random.")

BATCH_SIZE = 32
HELD_OUT_SHARE = 0.2
LAYERS = ("stride4", "stride8")


def make_backbone():
    """Return a small convolutional network: damage is local, and there are few photographs."""
    layers = keras.layers
    images = keras.Input((None, None, 3))
    x = layers.Conv2D(32, 4, strides=2, padding="same")(images)
    for stride, width in ((2, 32), (4, 64), (8, 96)):
        y = layers.DepthwiseConv2D(5, padding="same")(x)
        y = layers.LayerNormalization(epsilon=1e-6)(y)
        y = layers.Dense(64, activation="gelu")(y)
        x = layers.Add(name=f"stride{stride}")([x, layers.Dense(x.shape[-1])(y)])
        x = layers.Conv2D(width, 2, strides=2)(layers.LayerNormalization(epsilon=1e-6)(x))
    # The spread of a channel over the image shows what is in one place only; its mean does not.
    spread = keras.ops.sqrt(keras.ops.var(x, axis=(1, 2)) + 1e-4)
    features = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), spread])
    return keras.Model(images, features)


def load(folder):
    """Return the images of a folder that can be read, `(N, S, S, 3)`; the others are logged."""
    return sddns_tf.data.load_arrays(
        f"folder:{folder}", image_size=FLAGS.image_size, on_error="skip"
    )


def load_good_parts(good, calibration):
    """Map images to train on, and images to set the threshold."""
    parts = load(good)
    if calibration:
        return parts, load(calibration)
    parts = np.random.default_rng(FLAGS.seed).permutation(parts)
    return np.split(parts, [len(parts) - int(HELD_OUT_SHARE * len(parts))])


def train(images):
    """Self-distillation on good parts; what is a negative is made of them, by a shift."""
    steps = FLAGS.steps
    model = sddns_tf.SelfDistillation(
        backbone=make_backbone(),
        # The camera and its light do not change: nearly whole images, and no color jitter.
        views=sddns_tf.MultiCrop(
            FLAGS.image_size, local_views=2, global_area=(0.6, 1.0), color_jitter=0, grayscale=0
        ),
        # Parts put together in a wrong order. See docs/negatives.md for other choices.
        negatives=sddns_tf.Negatives("perm16", source="in_distribution"),
        head=sddns_tf.ProjectionHead(
            num_prototypes=512, hidden_dim=256, bottleneck_dim=64, norm_last_layer=False
        ),
        teacher_temperature=0.05,
        teacher_momentum=0.98,
        negative_weight=schedules.Linear(0.0, 0.5, int(0.4 * steps), int(0.1 * steps)),
        seed=FLAGS.seed,
    )
    rate = schedules.WarmupCosine(2e-3, 1e-5, steps, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.04))
    batches = sddns_tf.data.load(images, batch_size=BATCH_SIZE, shuffle=True, drop_remainder=True)
    model.fit(
        batches.repeat(),
        steps_per_epoch=steps // 10,
        epochs=10,
        callbacks=[sddns_tf.callbacks.CollapseMonitor()],
        shuffle=False,  # the data set does it
        verbose=2,
    )
    return model


def make_folders(root):
    """Folders to try the example on: good pieces, others to calibrate, and some to check."""
    import skimage.data

    generator = np.random.default_rng(FLAGS.seed)
    wall = skimage.data.brick()

    def pieces(rows, count):
        tops = generator.integers(rows[0], rows[1] - 96 + 1, count)
        lefts = generator.integers(0, wall.shape[1] - 96 + 1, count)
        return [wall[y : y + 96, x : x + 96].copy() for y, x in zip(tops, lefts, strict=True)]

    sets = {
        "good": {"piece": pieces((0, 340), 600)},
        # From other rows, so that no part of a piece was seen in training.
        "calibration": {"piece": pieces((340, 512), 150)},
        "check": {
            "sound": pieces((340, 512), 100),
            "damaged": (damaged := pieces((340, 512), 100)),
        },
        # Not black where damage was drawn.
        "masks": {"damaged": [_damage(piece, generator) for piece in damaged]},
    }
    for folder, kinds in sets.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for kind, images in kinds.items():
            for index, image in enumerate(images):
                path = root / folder / f"{kind}_{index:03}.png"
                keras.utils.save_img(path, image[..., np.newaxis], scale=False)
    return [root / name for name in ("good", "calibration", "check", "masks")]


def _damage(piece, generator):
    """Draws a dark or bright scratch or stain somewhere on a piece; returns its mask."""
    y, x = np.mgrid[:96, :96]
    center_y, center_x = generator.uniform(24, 72, 2)
    angle = generator.uniform(0, np.pi)
    along = (x - center_x) * np.cos(angle) + (y - center_y) * np.sin(angle)
    across = -(x - center_x) * np.sin(angle) + (y - center_y) * np.cos(angle)
    length, width = (30, 2.5) if generator.random() < 0.5 else (13, 10)
    mark = (along / length) ** 2 + (across / width) ** 2 < 1
    piece[mark] = 0.25 * piece[mark] + 0.75 * generator.choice([15, 240])
    return np.where(mark, np.uint8(255), np.uint8(0))


def write_results(files, images, answers, detector, output_dir):
    """The list of scores, the most suspicious first, and a picture of the top of it."""
    order = np.argsort(-answers["ood_score"])
    columns = ("ood_score", "p_value", "is_ood")
    with open(output_dir / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", *columns))
        writer.writerows([files[i], *(answers[column][i] for column in columns)] for i in order)
    top = order[:24]
    overlays = [
        plots.overlay(
            images[i], answers["anomaly_map"][i], detector.threshold, detector.lowest_score
        )
        for i in top
    ]
    figure = plots.contact_sheet(
        overlays,
        titles=[f"{files[i].stem}\np = {answers['p_value'][i]:.3f}" for i in top],
        title="Most suspicious first; painted: places above the threshold",
    )
    plots.save(figure, output_dir / "most_suspicious.png")


def print_what_was_found(files, answers, detector, masks_folder):
    """How many of the drawn damages were flagged, and how well the maps show them."""
    damaged = np.array([file.stem.startswith("damaged") for file in files])
    for kind, chosen in (("sound", ~damaged), ("damaged", damaged)):
        flagged = answers["is_ood"][chosen]
        print(f"  {kind}: {flagged.sum()} of {len(flagged)}")
    size = (FLAGS.image_size, FLAGS.image_size)
    masks = np.zeros((len(files), *size), bool)
    paths = [file for file, one in zip(files, damaged, strict=True) if one]
    masks[damaged] = mvtec.masks_of(paths, masks_folder, size)
    maps = metrics.at_size(answers["anomaly_map"], size)
    print(f"  pixel AUROC {metrics.pixel_auroc(maps, masks):.3f}")
    print(f"  AUPRO to 0.3 {metrics.aupro(maps, masks):.3f}")
    recall = metrics.region_recall(maps, masks, detector.threshold)
    print(f"  share of a damaged region above the threshold {recall:.3f}")


def main(argv):
    """Train on one folder, check another."""
    del argv
    if bool(FLAGS.good) != bool(FLAGS.check):
        raise app.UsageError("--good and --check go together: two folders, or neither.")
    keras.utils.set_random_seed(FLAGS.seed)
    output_dir = pathlib.Path(FLAGS.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    good, calibration, check = FLAGS.good, FLAGS.calibration, FLAGS.check
    if not good:
        good, calibration, check, masks = make_folders(output_dir / "photos")

    training, held_out = load_good_parts(good, calibration)
    print(f"{len(training)} good parts train, {len(held_out)} set the threshold")
    model = train(training)
    detector = sddns_tf.Detector.from_images(
        model.teacher_backbone,
        bank_images=training,
        calibration_images=held_out,
        false_positive_rate=FLAGS.false_positive_rate,
        image_size=FLAGS.image_size,
        layers=LAYERS,
        ignore=FLAGS.ignore,
        verbose=0,
    )

    files = [pathlib.Path(f) for f in sddns_tf.data.image_files(check, on_error="skip")]
    images = load(check)
    answers = detector.predict(images, verbose=0)
    write_results(files, images, answers, detector, output_dir)
    detector.save(output_dir / "detector.keras")
    print(f"{answers['is_ood'].sum()} of {len(files)} images flagged")
    if not FLAGS.good:
        print_what_was_found(files, answers, detector, masks)
    print(f"In {output_dir.resolve()}: scores.csv, most_suspicious.png, detector.keras")


if __name__ == "__main__":
    app.run(main)
