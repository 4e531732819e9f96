"""Industrial inspection: learn from a folder of good parts, and show what looks wrong in another.

    python examples/folder_of_parts.py --good=photos/good --check=photos/new

Only photographs of good parts are needed: 250 or more, all taken in the same way. A fifth of them
is held out to set the threshold; the others are for training. If several photographs show the same
part, set the threshold with photographs of other parts, `--calibration=photos/other_good_parts`. A
part that was used in training scores lower than a new one, so the threshold would be too low.

Writes to `--output_dir`: `scores.csv` (the images of `--check` with their p-values, the most
suspicious first), `most_suspicious.png` (with the places above the threshold) and `detector.keras`
(for `sddns export` and `sddns score`).

The detector is a local one: at most a fraction `--false_positive_rate` of good parts has any place
above the threshold. `--ignore=mask.png` leaves out areas that do not matter, such as a serial
number.

    python examples/folder_of_parts.py

Without folders, the example makes its own under `--output_dir`: pieces of a brick wall for
training, and fresh pieces to check, half of which have a drawn scratch or stain. (The wall is a
photograph that comes with scikit-image, `pip install -e ".[examples]"`.) This takes two to six
minutes on two CPU cores, free or busy. The example then prints how many of 100 damaged and 100
sound pieces it flagged (all damaged and one sound, with seed 0), and how well the maps show the
damage: pixel AUROC (0.991), AUPRO up to 30 % false positives (0.967), and the share of a damaged
region that is flagged (0.98). Drawn damage is easy: on real photographs expect less, see
docs/inspection.md.
"""

from sddns_tf.cli import starting

starting.import_tensorflow()  # without its messages, with oneDNN

import csv
import pathlib

import keras
import numpy as np
from absl import app, flags

import sddns_tf
from sddns_tf import calibration as calibrations
from sddns_tf import metrics, plots, schedules
from sddns_tf.data import mvtec

FLAGS = flags.FLAGS
flags.DEFINE_string("good", None, "Folder of photographs of good parts.")
flags.DEFINE_string("check", None, "Folder of photographs to check.")
flags.DEFINE_string(
    "calibration",
    None,
    "Folder of other good parts to set the threshold with. Default: a part of --good.",
)
flags.DEFINE_string(
    "ignore", None, "Mask for all photographs; areas that are not black are ignored."
)
flags.DEFINE_string("output_dir", "parts_output", "Folder to write to.")
flags.DEFINE_integer("image_size", 64, "Side in pixels to which photographs are resized.")
flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=10)
flags.DEFINE_float("false_positive_rate", 0.05, "Largest share of good parts to flag.", 0.0, 1.0)
flags.DEFINE_integer("seed", 0, "Random seed.")

BATCH_SIZE = 32
HELD_OUT_SHARE = 0.2
# Whose places are compared: half and a quarter of the resolution.
LAYERS = ("stage_2", "stage_3")


def load(folder):
    """Return the readable images of a folder, `(N, S, S, 3)`. The others are logged."""
    return sddns_tf.data.load_arrays(
        f"folder:{folder}", image_size=FLAGS.image_size, on_error="skip"
    )


def load_good_parts(good, calibration):
    """Return images to train on and images to set the threshold with."""
    parts = load(good)
    if calibration:
        return parts, load(calibration)
    parts = np.random.default_rng(FLAGS.seed).permutation(parts)
    return np.split(parts, [len(parts) - int(HELD_OUT_SHARE * len(parts))])


def train(images):
    """Return a model trained on good parts, with negatives made from them by a shift."""
    steps = FLAGS.steps
    model = sddns_tf.SelfDistillation(
        # Places were told apart a little better with GELU than with ReLU, the default.
        backbone=sddns_tf.ConvNet(activation="gelu"),
        # Camera and light do not change, so views are nearly whole images without color jitter.
        views=sddns_tf.MultiCrop(
            FLAGS.image_size, local_views=2, global_area=(0.6, 1.0), color_jitter=0, grayscale=0
        ),
        # Local damage: a piece of another place. See docs/negatives.md for other choices.
        negatives=sddns_tf.Negatives("cut_paste", source="in_distribution"),
        head=sddns_tf.ProjectionHead(
            num_prototypes=512, hidden_dim=256, bottleneck_dim=64, norm_last_layer=False
        ),
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
        shuffle=False,  # the data set is shuffled already
        verbose=2,
    )
    return model


def make_folders(root):
    """Make folders of good pieces, pieces to calibrate with, pieces to check, and masks."""
    import skimage.data

    generator = np.random.default_rng(FLAGS.seed)
    wall = skimage.data.brick()

    def pieces(rows, count):
        tops = generator.integers(rows[0], rows[1] - 96 + 1, count)
        lefts = generator.integers(0, wall.shape[1] - 96 + 1, count)
        return [wall[y : y + 96, x : x + 96].copy() for y, x in zip(tops, lefts, strict=True)]

    sets = {
        "good": {"piece": pieces((0, 340), 600)},
        # From other rows, so that nothing of them was seen in training.
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
    """Draw a dark or bright scratch or stain on a piece, and return its mask."""
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
    """Write the scores, the most suspicious first, and a picture of the first ones."""
    order = np.argsort(-answers["ood_score"])
    columns = ("ood_score", "p_value", "is_ood")
    # A name need not be valid Unicode.
    path = output_dir / "scores.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
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
        titles=[f"{shown(files[i].stem)}\np = {answers['p_value'][i]:.3f}" for i in top],
        title="Most suspicious first; places above the threshold are colored",
    )
    plots.save(figure, output_dir / "most_suspicious.png")


def shown(name):
    """Return a name of a file with a question mark for what cannot be shown."""
    return name.encode(errors="replace").decode()


def print_what_was_found(files, answers, detector, masks_folder):
    """Print how many damaged pieces were flagged, and how well the maps show the damage."""
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
    """Train on one folder and check another."""
    del argv
    if bool(FLAGS.good) != bool(FLAGS.check):
        raise app.UsageError(
            "--good and --check must be given together. Received: only one of them"
        )
    keras.utils.set_random_seed(FLAGS.seed)
    output_dir = pathlib.Path(FLAGS.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    good, calibration, check = FLAGS.good, FLAGS.calibration, FLAGS.check
    if not good:
        good, calibration, check, masks = make_folders(output_dir / "photos")

    training, held_out = load_good_parts(good, calibration)
    print(f"{len(training)} good parts to train on, {len(held_out)} to set the threshold with")
    # Now, because it would be told after training.
    calibrations.largest_flagged_rank(len(held_out), FLAGS.false_positive_rate)
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

    detector.save(output_dir / "detector.keras")
    files = [pathlib.Path(f) for f in sddns_tf.data.image_files(check, on_error="skip")]
    images = load(check)
    answers = detector.predict(images, verbose=0)
    write_results(files, images, answers, detector, output_dir)
    print(f"{answers['is_ood'].sum()} of {len(files)} images flagged")
    if not FLAGS.good:
        print_what_was_found(files, answers, detector, masks)
    print(f"Wrote scores.csv, most_suspicious.png and detector.keras to {output_dir.resolve()}")


if __name__ == "__main__":
    app.run(main)
