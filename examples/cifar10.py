r"""The paper's experiment on a small scale: CIFAR-10 as normal, another TFDS data set as auxiliary.

    python examples/cifar10.py --data_dir=TFDS --auxiliary=imagenet_resized/32x32 \
        --ood=cifar100,svhn_cropped,dtd

Trains a small vision transformer for four epochs, in about 20 minutes on two CPU cores. This is
only the beginning of a training run; results are far from the paper's.
`sddns train --recipe=cpu_small` trains the same network with checkpoints, and negatives that count
from the first step; `--recipe=paper_cifar10` is the paper's own recipe, which takes days on a GPU.

`TFDS` is a folder of prepared TensorFlow Datasets; nothing is downloaded. `tfds build NAME
--data_dir=TFDS` prepares public ones. All images are resized to the size of the normal ones.

Prints a table, and writes the model, the detector and pictures to `--output_dir`.
"""

import pathlib

import keras
from absl import app, flags

import sddns_tf
from sddns_tf import data, metrics, plots, schedules

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data sets; default: $TFDS_DATA_DIR.")
flags.DEFINE_string("output_dir", "cifar10_output", "Folder to write to.")
flags.DEFINE_string("in_distribution", "cifar10", "TFDS data set with the splits train and test.")
flags.DEFINE_string("auxiliary", "imagenet_resized/32x32", "TFDS data set to make negatives from.")
flags.DEFINE_list(
    "ood", ["cifar100", "svhn_cropped", "dtd"], "TFDS data sets, of which the test split is used."
)
flags.DEFINE_integer("epochs", 4, "Passes over the normal images.", lower_bound=1)

SIDE = 32
BATCH_SIZE = 96


def read(name, split):
    """Return the images of a prepared data set, uint8 `(N, 32, 32, 3)`."""
    return data.load_arrays(f"tfds:{name}", split=split, data_dir=FLAGS.data_dir, image_size=SIDE)


def make_model(steps):
    """Return the compiled model, with schedules over a number of steps."""
    model = sddns_tf.SelfDistillation(
        backbone=sddns_tf.VisionTransformer(
            SIDE, patch_size=4, hidden_dim=96, depth=4, num_heads=3
        ),
        views=sddns_tf.MultiCrop(SIDE, local_views=2, local_area=(0.15, 0.4)),
        negatives=sddns_tf.Negatives(shift="rot90", source="auxiliary"),
        head=sddns_tf.ProjectionHead(
            1024, hidden_dim=512, bottleneck_dim=128, norm_last_layer=False
        ),
        teacher_temperature=0.02,
        teacher_momentum=schedules.WarmupCosine(0.99, 1.0, steps),
        weight_decay=schedules.WarmupCosine(0.04, 0.4, steps),
    )
    learning_rate = schedules.WarmupCosine(
        0.005 * BATCH_SIZE / 256, 1e-6, steps, warmup_steps=steps // 20
    )
    model.compile(keras.optimizers.Adam(learning_rate))
    return model


def main(argv):
    """Train, make a detector, test it."""
    del argv
    keras.utils.set_random_seed(0)
    images, auxiliary = read(FLAGS.in_distribution, "train"), read(FLAGS.auxiliary, "train")
    # Half of the test images are for calibration, the others for testing.
    test = read(FLAGS.in_distribution, "test")
    calibration, fresh = test[::2], test[1::2]

    options = {"batch_size": BATCH_SIZE, "shuffle": True, "drop_remainder": True}
    batches = data.with_auxiliary(data.load(images, **options), data.load(auxiliary, **options))
    model = make_model(FLAGS.epochs * int(batches.cardinality()))
    history = model.fit(
        batches,
        epochs=FLAGS.epochs,
        callbacks=[
            sddns_tf.callbacks.CollapseMonitor(),
            sddns_tf.callbacks.OODProbe(images[:1000], calibration[:500]),
        ],
        verbose=2,
    )
    detector = sddns_tf.Detector.from_images(
        model.teacher_backbone,
        bank_images=images,
        calibration_images=calibration,
        false_positive_rate=0.05,
        image_size=SIDE,
        verbose=0,
    )

    normal = detector.predict(fresh, verbose=0)
    ood_scores = {}
    print(f"\n{'':20}{'AUROC':>8}{'FPR95':>8}{'flagged':>9}")
    for name in FLAGS.ood:
        found = detector.predict(read(name, "test"), verbose=0)
        ood_scores[name] = found["ood_score"]
        row = metrics.ood_metrics(normal["ood_score"], found["ood_score"])
        print(f"{name:20}{row['auroc']:8.3f}{row['fpr95']:8.3f}{found['is_ood'].mean():9.1%}")
    print(f"{'fresh normal images':36}{normal['is_ood'].mean():9.1%}  (asked for: 5 %)")

    output_dir = pathlib.Path(FLAGS.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save(output_dir / "model.keras")
    detector.save(output_dir / "detector.keras")
    scores = normal["ood_score"], ood_scores
    plots.save(plots.training_curves(history.history), output_dir / "training_curves.png")
    plots.save(plots.roc_curves(*scores), output_dir / "roc_curves.png")
    plots.save(
        plots.score_histograms(*scores, threshold=detector.threshold),
        output_dir / "score_histograms.png",
    )
    print(f"Wrote the model, the detector and pictures to {output_dir.resolve()}")


if __name__ == "__main__":
    app.run(main)
