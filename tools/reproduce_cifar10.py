r"""One run of the comparison in docs/results.md: CIFAR-10 as normal, one strategy, one seed.

    python tools/reproduce_cifar10.py --data_dir=TFDS --auxiliary_exclude=FILE \
        --strategy=auxiliary:rot90 --seed=0 --minutes=7 --output_dir=results

trains for about so many minutes, whatever the strategy, and writes to the folder
`auxiliary-rot90-0.json` (AUROC and FPR at 95 % of six OOD sets, sensitivities, what was trained and
how long) and `auxiliary-rot90-0.keras`, the detector. A run whose file is there is not repeated.

`TFDS` holds prepared `cifar10`, `cifar100`, and sets one has made oneself under the names
`imagenet_aux` (a 32 px ImageNet subset with the splits train and validation), `dtd32`, `gtsrb32`,
`mnist`; `FILE` lists the classes of the auxiliary set that show CIFAR-10's own, which are left out.
`tools/make_results.py` makes the tables of all runs in a folder.
"""

import json
import os
import pathlib
import time

import command_line
from absl import flags

FLAGS = flags.FLAGS

STRATEGIES = (
    "none", "auxiliary:identity", "auxiliary:rot90", "auxiliary:rot360", "auxiliary:perm4",
    "auxiliary:perm16", "auxiliary:pixel_perm", "in_distribution:rot90", "in_distribution:perm4",
    "both:rot90",
)  # fmt: skip
OOD_SETS = ("cifar100", "dtd32", "gtsrb32", "mnist")
SIZE = 32


def define_flags():
    """All flags of the program."""
    flags.DEFINE_string("data_dir", None, "Prepared TFDS sets; defaults to $TFDS_DATA_DIR.")
    flags.DEFINE_string("auxiliary_exclude", None, "File of class names to leave out.")
    flags.DEFINE_bool("auxiliary_overlap", False, "Train on those classes all the same.")
    flags.DEFINE_enum("strategy", "auxiliary:rot90", STRATEGIES, "Source and shift of negatives.")
    flags.DEFINE_integer("seed", 0, "Fixes weights, order, views and negatives.")
    flags.DEFINE_float("minutes", 7.0, "Train for about this long.", lower_bound=0.01)
    flags.DEFINE_integer("steps", None, "Train for so many steps instead.", lower_bound=4)
    flags.DEFINE_string("output_dir", "results", "Where the results go.")
    flags.DEFINE_string("name", None, "Of the files; defaults to strategy and seed.")
    flags.DEFINE_enum("network", "convolutional", ["convolutional", "vit"], "Backbone.")
    flags.DEFINE_integer("width", 64, "Channels of its first half, or of all of the transformer.")
    flags.DEFINE_float("teacher_temperature", 0.02, "Constant.")
    flags.DEFINE_float("teacher_momentum", 0.99, "At the start; a cosine to 1.")
    flags.DEFINE_float("negative_weight", 1.0, "Lambda after its ramp.")
    flags.DEFINE_float("negative_ramp", 0.2, "Share of the steps in which lambda rises.")
    flags.DEFINE_float("learning_rate", 2e-3, "Largest.")
    flags.DEFINE_integer("num_prototypes", 1024, "K.")
    flags.DEFINE_integer("local_views", 0, "Of 16 px.")
    flags.DEFINE_float("color_jitter", 0.8, "Probability of it.")
    flags.DEFINE_integer("batch_size", 96, "Images per step.")
    flags.DEFINE_integer("bank_images", 10_000, "Training images in the bank.")
    flags.DEFINE_integer("ood_images", 2_000, "Images of each OOD set, at most.")


def convolutional(width):
    """Depthwise convolutions with two dense layers, four times; mean and spread are the feature."""
    import keras

    layers = keras.layers
    images = keras.Input((None, None, 3))
    x = layers.Conv2D(width, 4, strides=2, padding="same")(images)
    for block, channels in enumerate((width, width, 2 * width, 2 * width)):
        if block == 2:
            x = layers.LayerNormalization(epsilon=1e-6)(x)
            x = layers.Conv2D(channels, 2, strides=2)(x)
        y = layers.DepthwiseConv2D(5, padding="same")(x)
        y = layers.LayerNormalization(epsilon=1e-6)(y)
        y = layers.Dense(2 * channels, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(channels)(y)])
    spread = keras.ops.sqrt(keras.ops.var(x, axis=(1, 2)) + 1e-4)
    features = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), spread])
    return keras.Model(images, features)


def make_model(steps):
    """The compiled model."""
    import keras

    import sddns_tf
    from sddns_tf import schedules

    keras.utils.set_random_seed(FLAGS.seed)
    if FLAGS.network == "vit":
        backbone = sddns_tf.VisionTransformer(
            SIZE, patch_size=4, hidden_dim=FLAGS.width, depth=4, num_heads=FLAGS.width // 32
        )
    else:
        backbone = convolutional(FLAGS.width)
    negatives = None
    if FLAGS.strategy != "none":
        source, shift = FLAGS.strategy.split(":")
        negatives = sddns_tf.Negatives(shift, source)
    weight = FLAGS.negative_weight
    if FLAGS.negative_ramp:
        ramp, start = int(FLAGS.negative_ramp * steps), int(0.05 * steps)
        weight = schedules.Linear(0.0, weight, max(ramp, 1), start)
    model = sddns_tf.SelfDistillation(
        backbone,
        sddns_tf.MultiCrop(
            SIZE, FLAGS.local_views, local_area=(0.15, 0.4), color_jitter=FLAGS.color_jitter
        ),
        negatives,
        head=sddns_tf.ProjectionHead(
            FLAGS.num_prototypes, hidden_dim=512, bottleneck_dim=128, norm_last_layer=False
        ),
        teacher_temperature=FLAGS.teacher_temperature,
        teacher_momentum=schedules.WarmupCosine(FLAGS.teacher_momentum, 1.0, steps),
        negative_weight=weight,
        seed=FLAGS.seed,
    )
    learning_rate = schedules.WarmupCosine(
        FLAGS.learning_rate, 1e-5, steps, warmup_steps=steps // 10
    )
    model.compile(keras.optimizers.AdamW(learning_rate, weight_decay=0.04))
    return model


def read(name, split, exclude=()):
    """Images of a TFDS set at CIFAR's size."""
    from sddns_tf import data

    return data.load_arrays(
        f"tfds:{name}",
        split=split,
        data_dir=FLAGS.data_dir,
        image_size=SIZE,
        exclude_labels=exclude,
    )


def excluded_classes():
    """Class names in the file; what follows on a line is a comment."""
    if not FLAGS.auxiliary_exclude:
        return []
    lines = pathlib.Path(FLAGS.auxiliary_exclude).read_text().splitlines()
    return [line.split()[0] for line in lines if line.strip() and line[0] != "#"]


def training_batches(images):
    """Endless batches, with auxiliary images where the strategy needs them."""
    from sddns_tf import data

    options = {"batch_size": FLAGS.batch_size, "shuffle": True, "drop_remainder": True}
    batches = data.load(images, seed=FLAGS.seed, **options)
    if FLAGS.strategy.startswith(("auxiliary", "both")):
        exclude = () if FLAGS.auxiliary_overlap else excluded_classes()
        auxiliary = read("imagenet_aux", "train", exclude)
        auxiliary = data.load(auxiliary, seed=FLAGS.seed + 1, **options)
        batches = data.with_auxiliary(batches, auxiliary)
    return batches.repeat()


def seconds_per_step(batches):
    """Measured on a model that is thrown away, so that minutes can be told in steps."""
    import keras
    import numpy as np

    times = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    make_model(1000).fit(batches, steps_per_epoch=23, callbacks=[clock], verbose=0)
    return float(np.median(np.diff(times[2:])))


def read_ood():
    """Images of each OOD set by name."""
    import numpy as np

    ood = {name: read(name, "test")[: FLAGS.ood_images] for name in OOD_SETS}
    ood["imagenet_aux"] = read("imagenet_aux", "validation", excluded_classes())
    noise = np.random.default_rng(0).integers(0, 256, (1000, SIZE, SIZE, 3))
    ood["noise"] = noise.astype(np.uint8)
    return ood


def make_detector(network, images, test_images):
    """A detector on `network`, as all runs have it."""
    import sddns_tf

    return sddns_tf.Detector.from_images(
        network,
        bank_images=images[: FLAGS.bank_images],
        calibration_images=test_images[0:5000:2],
        image_size=SIZE,
        verbose=0,
    )


def auroc_by_network(model, images, test_images, ood):
    """AUROC of each OOD set when the score looks at another part of the model."""
    import keras

    from sddns_tf import metrics

    networks = {
        "student backbone": model.student_backbone,
        "teacher head": keras.Sequential([model.teacher_backbone, model.teacher_head]),
        "student head": keras.Sequential([model.student_backbone, model.student_head]),
    }
    table = {}
    for name, network in networks.items():
        detector = make_detector(network, images, test_images)
        normal = detector.predict(test_images[1:5000:2], verbose=0)["ood_score"]
        table[name] = {
            key: metrics.ood_metrics(normal, detector.predict(one, verbose=0)["ood_score"])["auroc"]
            for key, one in ood.items()
        }
    return table


def evaluate(detector, held_out, ood):
    """AUROC, FPR at 95 % and share flagged for each OOD set; sensitivities from held-out images."""
    import numpy as np

    from sddns_tf import metrics, sensitivity

    out = detector.predict(held_out, verbose=0)
    table = {}
    for name, images in ood.items():
        other = detector.predict(images, verbose=0)
        row = metrics.ood_metrics(out["ood_score"], other["ood_score"])
        table[name] = {**row, "flagged": float(np.mean(other["is_ood"]))}
    shift = None if FLAGS.strategy == "none" else FLAGS.strategy.split(":")[1]
    probed = sensitivity.sensitivity(
        detector, held_out[:1000], trained_on=None if shift == "identity" else shift
    )
    return {
        "ood": table,
        "sensitivity": probed,
        "fresh_flagged": float(np.mean(out["is_ood"])),
    }


def main():
    """One run, if it is not there yet."""
    name = FLAGS.name or f"{FLAGS.strategy.replace(':', '-')}-{FLAGS.seed}"
    folder = pathlib.Path(FLAGS.output_dir)
    target = folder / f"{name}.json"
    if target.exists():
        command_line.say(f"{target} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    import numpy as np

    import sddns_tf

    images, test_images = read("cifar10", "train"), read("cifar10", "test")
    batches = training_batches(images)
    steps = FLAGS.steps or max(4, int(60 * FLAGS.minutes / seconds_per_step(batches)))
    model = make_model(steps)
    start = time.perf_counter()
    epochs = 4
    history = model.fit(
        batches,
        steps_per_epoch=steps // epochs,
        epochs=epochs,
        callbacks=[sddns_tf.callbacks.CollapseMonitor()],
        shuffle=False,  # the data set does it
        verbose=2,
    ).history
    seconds = time.perf_counter() - start
    detector = make_detector(model.teacher_backbone, images, test_images)
    detector.save(folder / f"{name}.keras")
    ood = read_ood()
    record = {
        "flags": {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module("__main__")},
        "steps": int(model.step),
        "images": int(model.step) * FLAGS.batch_size,
        "seconds": seconds,
        "parameters": model.teacher_backbone.count_params(),
        "history": {key: [float(x) for x in values] for key, values in history.items()},
        **evaluate(detector, test_images[1:5000:2], ood),
        "auroc_by_network": auroc_by_network(model, images, test_images, ood),
    }
    for path_flag in ("data_dir", "auxiliary_exclude", "output_dir"):
        record["flags"].pop(path_flag, None)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1))
    os.replace(unfinished, target)
    aurocs = {key: round(row["auroc"], 3) for key, row in record["ood"].items()}
    mean = float(np.mean(list(aurocs.values())))
    print(json.dumps({"name": name, "steps": record["steps"], "mean": mean, **aurocs}))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
