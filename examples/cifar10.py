"""CIFAR-10 as normal, any TFDS set as auxiliary and as OOD: the paper's experiment.

    python examples/cifar10.py --data_dir=TFDS --recipe=cpu --minutes=20

trains the small recipe for 20 minutes on two CPU cores, RESULT_LINE

    python examples/cifar10.py --data_dir=TFDS

is the paper's recipe (ViT-S/16 on images enlarged to 256 px, 500 epochs, batch 128): days on one
GPU; not run here. `TFDS` holds prepared TensorFlow-Datasets; nothing is downloaded. Any set
there is known by its name: `--auxiliary`, `--ood`. Class names listed in the file
`--auxiliary_exclude` (one at the start of each line) are left out of the auxiliary images: those
that show CIFAR-10's own classes.

Writes the training curves, score histograms, ROC curves, `results.json`, the model and the
detector to `--output_dir`. Training goes on from the last epoch if it was stopped.
"""

import dataclasses
import json
import pathlib
import time

import keras
import numpy as np
from absl import app, flags

import sddns_tf
from sddns_tf import data, metrics, plots, schedules

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Prepared TFDS sets; defaults to $TFDS_DATA_DIR.")
flags.DEFINE_string("output_dir", "cifar10_output", "Where results go.")
flags.DEFINE_enum("recipe", "paper", ["paper", "cpu"], "Paper's recipe, or one for two CPU cores.")
flags.DEFINE_string("in_distribution", "cifar10", "TFDS set with the splits train and test.")
flags.DEFINE_string("auxiliary", "imagenet_aux", "TFDS set whose train split makes negatives.")
flags.DEFINE_string("auxiliary_exclude", None, "File of class names to leave out of it.")
flags.DEFINE_list("ood", ["cifar100", "gtsrb32", "dtd32"], "TFDS sets; their test splits.")
flags.DEFINE_string("shift", "rot90", "Shift of the negatives, or 'none' for no negatives.")
flags.DEFINE_enum(
    "source", "auxiliary", ["auxiliary", "in_distribution", "both"], "What is shifted."
)
flags.DEFINE_integer("epochs", None, "Epochs; defaults to the recipe's.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Train for about this long instead.", lower_bound=0.1)
flags.DEFINE_integer("seed", 0, "Fixes weights, order, views and negatives.")

FALSE_POSITIVE_RATE = 0.05
STEPS_BETWEEN_LOGS = 200  # with --minutes, where an epoch would be long


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the two recipes differ in; the fields are those of METHOD's list."""

    image_size: int
    batch_size: int
    epochs: float
    warmup_epochs: float
    learning_rate: float
    teacher_momentum: float
    teacher_temperature: tuple
    local_views: int
    num_prototypes: int
    frozen_last_layer_epochs: float


PAPER = Recipe(
    image_size=256,
    batch_size=128,
    epochs=500,
    warmup_epochs=30,
    learning_rate=0.004 * 128 / 256,
    teacher_momentum=0.996,
    teacher_temperature=(0.04, 0.01),
    local_views=8,
    num_prototypes=4096,
    frozen_last_layer_epochs=1,
)
CPU = Recipe(
    image_size=32,
    batch_size=96,
    epochs=4,
    warmup_epochs=0.2,
    learning_rate=0.002,
    teacher_momentum=0.99,
    teacher_temperature=(0.02, 0.02),
    local_views=2,
    num_prototypes=1024,
    frozen_last_layer_epochs=0,
)


def make_model(recipe, steps_per_epoch, total_steps):
    """The compiled model of a recipe."""
    keras.utils.set_random_seed(FLAGS.seed)
    size = recipe.image_size
    if recipe is PAPER:
        backbone = sddns_tf.vit_small(image_size=size, patch_size=16, drop_path_rate=0.1)
        head = sddns_tf.ProjectionHead(recipe.num_prototypes, norm_last_layer=False)
    else:
        backbone = sddns_tf.VisionTransformer(
            size, patch_size=4, hidden_dim=96, depth=4, num_heads=3
        )
        head = sddns_tf.ProjectionHead(
            recipe.num_prototypes, hidden_dim=512, bottleneck_dim=128, norm_last_layer=False
        )
    negatives = None
    if FLAGS.shift != "none":
        negatives = sddns_tf.Negatives(FLAGS.shift, FLAGS.source)
    model = sddns_tf.SelfDistillation(
        backbone=backbone,
        views=sddns_tf.MultiCrop(size, recipe.local_views, local_area=(0.15, 0.4)),
        negatives=negatives,
        head=head,
        teacher_temperature=schedules.Linear(*recipe.teacher_temperature, end_step=total_steps),
        teacher_momentum=schedules.WarmupCosine(recipe.teacher_momentum, 1.0, total_steps),
        weight_decay=schedules.WarmupCosine(0.04, 0.4, total_steps),
        frozen_last_layer_steps=int(recipe.frozen_last_layer_epochs * steps_per_epoch),
        seed=FLAGS.seed,
    )
    warmup_steps = min(int(recipe.warmup_epochs * steps_per_epoch), total_steps)
    learning_rate = schedules.WarmupCosine(
        recipe.learning_rate, 1e-6, total_steps, warmup_steps=warmup_steps
    )
    model.compile(keras.optimizers.Adam(learning_rate))
    return model


def training_batches(recipe, images):
    """Batches of the images, with auxiliary images where negatives need them."""
    options = {"batch_size": recipe.batch_size, "shuffle": True, "drop_remainder": True}
    batches = data.load(images, seed=FLAGS.seed, **options)
    if FLAGS.shift == "none" or FLAGS.source == "in_distribution":
        return batches
    excluded = ()
    if FLAGS.auxiliary_exclude:
        lines = pathlib.Path(FLAGS.auxiliary_exclude).read_text().splitlines()
        excluded = [line.split()[0] for line in lines if line.strip() and line[0] != "#"]
    auxiliary = data.load_arrays(
        f"tfds:{FLAGS.auxiliary}", data_dir=FLAGS.data_dir, exclude_labels=excluded
    )
    return data.with_auxiliary(batches, data.load(auxiliary, seed=FLAGS.seed + 1, **options))


def train(model, batches, steps_per_epoch, epochs, images, held_out, output_dir):
    """Fit, going on from the last complete epoch if there is one."""
    callbacks = [
        keras.callbacks.BackupAndRestore(output_dir / "backup"),
        sddns_tf.callbacks.CollapseMonitor(),
        sddns_tf.callbacks.OODProbe(images[:2000], held_out[:1000], every=max(1, epochs // 10)),
        keras.callbacks.CSVLogger(output_dir / "log.csv"),
        keras.callbacks.TensorBoard(output_dir / "tensorboard"),
    ]
    return model.fit(
        batches, steps_per_epoch=steps_per_epoch, epochs=epochs, callbacks=callbacks, verbose=2
    ).history


def seconds_per_step(recipe, batches):
    """Measured on a model that is thrown away, so that `--minutes` can be told in steps."""
    model = make_model(recipe, steps_per_epoch=1, total_steps=1000)
    model.fit(batches.take(3), verbose=0)
    start = time.perf_counter()
    model.fit(batches.take(20), verbose=0)
    return (time.perf_counter() - start) / 20


def evaluate(detector, test_images):
    """Table of each OOD set against the test images that did not calibrate; scores by name."""
    test = detector.predict(test_images, verbose=0)
    ood_scores, table = {}, {}
    for name in FLAGS.ood:
        images = data.load_arrays(f"tfds:{name}", split="test", data_dir=FLAGS.data_dir)
        out = detector.predict(images, verbose=0)
        ood_scores[name] = out["ood_score"]
        table[name] = metrics.ood_metrics(test["ood_score"], out["ood_score"])
        table[name]["flagged"] = float(np.mean(out["is_ood"]))
    table["fresh normal images"] = {"flagged": float(np.mean(test["is_ood"]))}
    return table, test["ood_score"], ood_scores


def print_table(table):
    """One line for each OOD set."""
    columns = ("auroc", "aupr_in", "aupr_out", "fpr95", "flagged")
    print(f"\n{'':24}" + "".join(f"{name:>10}" for name in columns))
    for name, row in table.items():
        cells = [f"{row[column]:10.3f}" if column in row else " " * 10 for column in columns]
        print(f"{name:24}" + "".join(cells))


def main(argv):
    """Train, make a detector, evaluate, write everything."""
    del argv
    output_dir = pathlib.Path(FLAGS.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    recipe = PAPER if FLAGS.recipe == "paper" else CPU
    images, labels = data.load_arrays(
        f"tfds:{FLAGS.in_distribution}", data_dir=FLAGS.data_dir, with_labels=True
    )
    test_images, test_labels = data.load_arrays(
        f"tfds:{FLAGS.in_distribution}", split="test", data_dir=FLAGS.data_dir, with_labels=True
    )
    # One half of the test images calibrates, the other is what the table is about.
    calibration, fresh = test_images[::2], test_images[1::2]
    batches = training_batches(recipe, images)

    epochs, steps_per_epoch = FLAGS.epochs or recipe.epochs, int(batches.cardinality())
    if FLAGS.minutes:
        steps = int(60 * FLAGS.minutes / seconds_per_step(recipe, batches))
        epochs = -(-steps // STEPS_BETWEEN_LOGS)
        steps_per_epoch = steps // epochs
    model = make_model(recipe, steps_per_epoch, epochs * steps_per_epoch)
    start = time.perf_counter()
    history = train(
        model, batches.repeat(), steps_per_epoch, epochs, images, calibration, output_dir
    )
    minutes = (time.perf_counter() - start) / 60
    print(f"trained {int(model.step)} steps of {recipe.batch_size} images in {minutes:.1f} minutes")

    detector = sddns_tf.Detector.from_images(
        model.teacher_backbone,
        bank=images,
        calibration=calibration,
        false_positive_rate=FALSE_POSITIVE_RATE,
        image_size=recipe.image_size,
    )
    table, scores, ood_scores = evaluate(detector, fresh)
    print_table(table)
    knn_accuracy = metrics.knn_accuracy(
        detector.features(images), labels, detector.features(fresh), test_labels[1::2]
    )
    print(f"\nk-NN accuracy of the features, as a check of them: {knn_accuracy:.3f}")

    results = {"table": table, "knn_accuracy": knn_accuracy, "minutes": minutes}
    (output_dir / "results.json").write_text(json.dumps(results, indent=2))
    plots.save(plots.training_curves(history), output_dir / "training_curves.png")
    histograms = plots.score_histograms(scores, ood_scores, threshold=detector.threshold)
    plots.save(histograms, output_dir / "score_histograms.png")
    plots.save(plots.roc_curves(scores, ood_scores), output_dir / "roc_curves.png")
    model.save(output_dir / "model.keras")
    detector.save(output_dir / "detector.keras")
    print(f"pictures, model and detector: {output_dir.resolve()}")


if __name__ == "__main__":
    app.run(main)
