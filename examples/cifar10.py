r"""CIFAR-10 as normal, any TFDS set as auxiliary and as OOD: the paper's experiment.

    python examples/cifar10.py --data_dir=TFDS --recipe=cpu --minutes=20 \
        --auxiliary=imagenet_aux --auxiliary_exclude=FILE --ood=cifar100,gtsrb32,dtd32,mnist

trains the small recipe for 20 minutes on two CPU cores: 2,068 steps of 96 images gave AUROC 0.558
against cifar100, 0.749 gtsrb32, 0.844 dtd32, 0.881 mnist, and flagged 5.5 % of fresh normal images
(asked for: 5 %). That is far from the paper: it is the start of the curve.

    python examples/cifar10.py --data_dir=TFDS

is the paper's recipe (ViT-S/16 on images enlarged to 256 px, 500 epochs, batch 128): days on one
GPU; not run here.

`TFDS` holds prepared TensorFlow-Datasets; nothing is downloaded. Any set there is known by its
name. Public ones are `imagenet_resized/32x32` and `places365_small` (auxiliary), `cifar100`,
`svhn_cropped`, `dtd` and `places365_small` (OOD); `tfds build NAME --data_dir=TFDS` prepares them.
`imagenet_aux` (a 64 px ImageNet subset), `gtsrb32` and `dtd32` (traffic signs and textures, 32 px)
are sets that one has prepared oneself under these names. Images of another size are resized to that
of the normal ones. Class names listed in the file `--auxiliary_exclude` (one at the start of each
line) are left out of the auxiliary images: those that show CIFAR-10's own classes.

Writes to `--output_dir` the model, the detector, `results.json`, training curves, score histograms,
ROC curves and attention maps. The same command goes on from the last epoch if training was stopped,
for the steps planned at first (`run.json`).
"""

import csv
import dataclasses
import json
import os
import pathlib
import time

import keras
import numpy as np
from absl import app, flags

import sddns_tf
from sddns_tf import data, image_ops, metrics, plots, schedules
from sddns_tf.features import extract_features

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Prepared TFDS sets; defaults to $TFDS_DATA_DIR.")
flags.DEFINE_string("output_dir", "cifar10_output", "Where results go.")
flags.DEFINE_enum("recipe", "paper", ["paper", "cpu"], "Paper's recipe, or one for two CPU cores.")
flags.DEFINE_string("in_distribution", "cifar10", "TFDS set with the splits train and test.")
flags.DEFINE_string(
    "auxiliary", "imagenet_resized/32x32", "TFDS set whose train split makes negatives; in memory."
)
flags.DEFINE_string("auxiliary_exclude", None, "File of class names to leave out of it.")
flags.DEFINE_list("ood", ["cifar100", "svhn_cropped", "dtd"], "TFDS sets; their test splits.")
flags.DEFINE_string("shift", "rot90", "Shift of the negatives, or 'none' for no negatives.")
flags.DEFINE_enum(
    "source", "auxiliary", ["auxiliary", "in_distribution", "both"], "What is shifted."
)
flags.DEFINE_integer("epochs", None, "Epochs; defaults to the recipe's.", lower_bound=1)
flags.DEFINE_float("minutes", None, "Train for about this long instead.", lower_bound=0.1)
flags.DEFINE_integer("seed", 0, "Fixes weights, order, views and negatives.")

FALSE_POSITIVE_RATE = 0.05
STEPS_BETWEEN_LOGS = 200  # with --minutes, where an epoch would be long
RUN_FLAGS = (
    "recipe", "in_distribution", "auxiliary", "auxiliary_exclude", "shift", "source", "epochs",
    "minutes", "seed",
)  # fmt: skip


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
        f"tfds:{FLAGS.auxiliary}",
        data_dir=FLAGS.data_dir,
        exclude_labels=excluded,
        image_size=images.shape[1],
    )
    return data.with_auxiliary(batches, data.load(auxiliary, seed=FLAGS.seed + 1, **options))


def write_json(path, value):
    """Written beside its place and renamed: never half a file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=2))
    os.replace(unfinished, path)


def first_plan(output_dir):
    """The plan of the run that was begun in `output_dir`, or None if there is none."""
    path = output_dir / "run.json"
    if not path.exists():
        return None
    plan = json.loads(path.read_text())
    for name, value in plan["flags"].items():
        if FLAGS[name].value != value:
            raise app.UsageError(
                f"{output_dir} holds a run with --{name}={value}. Received "
                f"--{name}={FLAGS[name].value}: choose another --output_dir."
            )
    return plan


def make_plan(recipe, batches):
    """How long to train, and the flags that define the run."""
    epochs, steps_per_epoch = FLAGS.epochs or recipe.epochs, int(batches.cardinality())
    if FLAGS.minutes:
        steps = max(1, int(60 * FLAGS.minutes / seconds_per_step(recipe, batches)))
        epochs = -(-steps // STEPS_BETWEEN_LOGS)
        steps_per_epoch = steps // epochs
    return {
        "flags": {name: FLAGS[name].value for name in RUN_FLAGS},
        "steps": epochs * steps_per_epoch,
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
    }


def seconds_per_step(recipe, batches):
    """Measured on a model that is thrown away, so that `--minutes` can be told in steps."""
    model = make_model(recipe, steps_per_epoch=1, total_steps=1000)
    times = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    model.fit(batches.repeat(), steps_per_epoch=23, callbacks=[clock], verbose=0)
    return (times[-1] - times[2]) / 20  # without compilation and the filling of buffers


class Clock(keras.callbacks.Callback):
    """Logs the seconds of each epoch, so that a run that was stopped still knows its time."""

    def on_epoch_begin(self, epoch, logs=None):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Write into the logs."""
        logs["seconds"] = time.perf_counter() - self.start


def train(model, batches, plan, images, held_out, output_dir):
    """Fit, going on from the last complete epoch if there is one; the log of the whole run."""
    callbacks = [
        sddns_tf.callbacks.CollapseMonitor(),
        sddns_tf.callbacks.OODProbe(images[:1000], held_out[:500]),
        Clock(),
        keras.callbacks.CSVLogger(output_dir / "log.csv", append=True),
        # Kept after the end: the same command then evaluates without training again.
        keras.callbacks.BackupAndRestore(
            output_dir / "backup", double_checkpoint=True, delete_checkpoint=False
        ),
    ]
    model.fit(
        batches.repeat(),
        steps_per_epoch=plan["steps_per_epoch"],
        epochs=plan["epochs"],
        callbacks=callbacks,
        shuffle=False,  # the data set does it
        verbose=2,
    )
    with open(output_dir / "log.csv", newline="") as file:
        # Stopped between log and backup, an epoch is done twice: the second time counts.
        rows = {row.pop("epoch"): row for row in csv.DictReader(file)}
    names = [name for name in next(iter(rows.values())) if not name.startswith("val_")]
    return {name: [float(row[name]) for row in rows.values()] for name in names}


def evaluate(detector, test_images):
    """Table of each OOD set against the test images that did not calibrate; scores by name."""
    test = detector.predict(test_images, verbose=0)
    ood_scores, table = {}, {}
    for name in FLAGS.ood:
        images = data.load_arrays(
            f"tfds:{name}",
            split="test",
            data_dir=FLAGS.data_dir,
            image_size=test_images.shape[1],
        )
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


def write_pictures(detector, log, images, scores, ood_scores, output_dir):
    """Training curves, score histograms, ROC curves, and where the network looks."""
    backbone, size = detector.extractor.backbone, detector.extractor.image_size
    attention = backbone.attention_weights(image_ops.normalize(image_ops.resize(images[:6], *size)))
    figures = {
        "training_curves": plots.training_curves(log),
        "score_histograms": plots.score_histograms(scores, ood_scores, detector.threshold),
        "roc_curves": plots.roc_curves(scores, ood_scores),
        "attention": plots.attention_overlay(images[:6], attention),
    }
    for name, figure in figures.items():
        plots.save(figure, output_dir / f"{name}.png")


def main(argv):
    """Train, make a detector, evaluate, write everything."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    output_dir = pathlib.Path(FLAGS.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    plan = first_plan(output_dir)
    recipe = PAPER if FLAGS.recipe == "paper" else CPU
    normal = {
        "source": f"tfds:{FLAGS.in_distribution}", "data_dir": FLAGS.data_dir, "with_labels": True
    }  # fmt: skip
    images, labels = data.load_arrays(**normal)
    test_images, test_labels = data.load_arrays(**normal, split="test")
    # One half of the test images calibrates, the other is what the table is about.
    calibration, fresh, fresh_labels = test_images[::2], test_images[1::2], test_labels[1::2]
    batches = training_batches(recipe, images)

    if plan is None:
        plan = make_plan(recipe, batches)
        write_json(output_dir / "run.json", plan)
    model = make_model(recipe, plan["steps_per_epoch"], plan["steps"])
    log = train(model, batches, plan, images, calibration, output_dir)
    minutes = sum(log["seconds"]) / 60
    print(f"trained {int(model.step)} steps of {recipe.batch_size} images in {minutes:.1f} minutes")

    detector = sddns_tf.Detector.from_images(
        model.teacher_backbone,
        bank_images=images,
        calibration_images=calibration,
        false_positive_rate=FALSE_POSITIVE_RATE,
        image_size=recipe.image_size,
    )
    model.save(output_dir / "model.keras")
    detector.save(output_dir / "detector.keras")

    table, scores, ood_scores = evaluate(detector, fresh)
    print_table(table)
    features = extract_features(detector.extractor, images, verbose=0)
    fresh_features = extract_features(detector.extractor, fresh, verbose=0)
    knn_accuracy = metrics.knn_accuracy(features, labels, fresh_features, fresh_labels)
    print(f"\nk-NN accuracy of the features, as a check of them: {knn_accuracy:.3f}")
    results = {"table": table, "knn_accuracy": knn_accuracy, "minutes": minutes}
    write_json(output_dir / "results.json", results)
    write_pictures(detector, log, fresh, scores, ood_scores, output_dir)
    print(f"model, detector, results and pictures: {output_dir.resolve()}")


if __name__ == "__main__":
    app.run(main)
