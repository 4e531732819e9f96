r"""Trains on unlabelled normal images and makes a calibrated detector.

    python tools/train.py --data=folder:parts/good --auxiliary=folder:photos --image_size=64 \
        --output_dir=parts

    python tools/train.py --recipe=cpu_small --data_dir=TFDS --epochs=1 --output_dir=cifar10

A recipe sets flags, those on the command line override it; `tools/recipes/` holds some, and a path
to a file like them will do. Without a recipe the flags' own defaults hold, listed below.

Writes to --output_dir:
  detector.keras   the calibrated detector: what `evaluate.py`, `score.py` and `export.py` take
  backbone.keras   the teacher's backbone alone
  model.keras      the whole training state, to train on
  config.json      the value of every flag and what followed from it
  log.csv          what was logged in each epoch
  tensorboard/     scalars, views, negatives, separation of scores, where TensorBoard is installed
  checkpoint/      from which the same command goes on if it was stopped (--noresume starts anew)
"""

import importlib.util
import json
import math
import os
import pathlib
import shutil
import types

import command_line
from absl import flags

FLAGS = flags.FLAGS
RECIPES = pathlib.Path(__file__).parent / "recipes"
BACKBONES = ("vit_tiny", "vit_small", "vit_base")
SHIFTS = ("rot90", "rot360", "perm4", "perm16", "pixel_perm", "identity", "none")
OWN_FLAGS = set()  # names, filled by define_flags
# May differ between the command that began a run and one that goes on with it.
NOT_OF_THE_RUN = (
    "data_dir", "output_dir", "recipe", "resume", "strategy", "pictures_every", "checkpoint_every",
    "rollbacks",
)  # fmt: skip


def define_flags():
    """All flags of the program."""
    of_others = set(FLAGS)
    command_line.define_data_flags()
    command_line.define_detector_flags()
    _define_run_flags()
    _define_network_flags()
    _define_view_flags()
    _define_loss_flags()
    _define_optimizer_flags()
    OWN_FLAGS.update(set(FLAGS) - of_others)


def _define_run_flags():
    flags.DEFINE_string("recipe", None, "Name of a file in tools/recipes/, or path of one.")
    flags.DEFINE_string("data", None, "Source of the normal images to train on (split: train).")
    flags.DEFINE_string(
        "auxiliary", None, "Source of unrelated images that make negatives (split: train)."
    )
    flags.DEFINE_string(
        "auxiliary_exclude", None, "File of class names, one a line, to leave out of a TFDS set."
    )
    flags.DEFINE_float(
        "calibration_share",
        0.1,
        "Share of --data held out to calibrate, where --calibration is not given.",
        0.0,
        0.9,
    )
    flags.DEFINE_integer("limit", None, "Train on at most so many images.", 1)
    flags.DEFINE_bool(
        "in_memory",
        True,
        "Hold the training images in memory. Without, they are read in each epoch, and "
        "--calibration is needed.",
    )
    flags.DEFINE_string("output_dir", None, "Folder to write to.")
    flags.DEFINE_bool("resume", True, "Go on with the run in --output_dir if there is one.")
    flags.DEFINE_enum(
        "strategy",
        "auto",
        ["auto", "none", "mirrored", "multi_worker"],
        "Devices: all GPUs of this machine if it has several (auto, mirrored), one, or those of "
        "the machines that $TF_CONFIG names.",
    )
    flags.DEFINE_enum(
        "precision",
        "float32",
        ["float32", "mixed_bfloat16", "mixed_float16"],
        "Keras' dtype policy.",
    )
    flags.DEFINE_integer("checkpoint_every", 500, "Steps between two checkpoints.", 1)
    flags.DEFINE_integer(
        "rollbacks",
        0,
        "How often to go back to the last checkpoint, and on at half the learning rate, where a "
        "loss or weight is not finite, before giving up.",
        0,
    )
    flags.DEFINE_integer("pictures_every", 5, "Epochs between histograms in TensorBoard.", 1)


def _define_network_flags():
    flags.DEFINE_string(
        "backbone", "vit_tiny", f"One of {', '.join(BACKBONES)}, or a .keras file to start from."
    )
    flags.DEFINE_string("weights", None, "Backbone's weights to start from (.weights.h5).")
    flags.DEFINE_integer("image_size", None, "Side of the network's input; default: resolution.", 1)
    flags.DEFINE_list(
        "resolution",
        None,
        "SIDE or HEIGHT,WIDTH at which images are read. Default: the images' own size; of a "
        "folder, --image_size if that is given.",
    )
    flags.DEFINE_integer("patch_size", 4, "Side of a patch of the transformer.", 1)
    flags.DEFINE_integer("hidden_dim", None, "Width of the transformer; default: the preset's.", 1)
    flags.DEFINE_integer("depth", None, "Blocks of the transformer; default: the preset's.", 1)
    flags.DEFINE_integer("num_heads", None, "Attention heads; default: the preset's.", 1)
    flags.DEFINE_float("drop_path_rate", 0.0, "Stochastic depth of the student.", 0.0, 0.999)
    flags.DEFINE_bool("recompute", False, "Compute blocks again for the gradient: less memory.")
    flags.DEFINE_integer("num_prototypes", 4096, "Outputs K of the projection head.", 1)
    flags.DEFINE_integer("head_hidden_dim", 2048, "Width of the head's hidden layers.", 1)
    flags.DEFINE_integer("bottleneck_dim", 256, "Width of the head's bottleneck.", 1)
    flags.DEFINE_integer("head_layers", 3, "Linear layers in the head's MLP.", 1)
    flags.DEFINE_bool("norm_last_layer", True, "Whether the last layer's gain is fixed at 1.")
    flags.DEFINE_list("mean", ["0.485", "0.456", "0.406"], "Mean of the channels, images in 0-1.")
    flags.DEFINE_list("std", ["0.229", "0.224", "0.225"], "Their standard deviations.")


def _define_view_flags():
    flags.DEFINE_enum("shift", "rot90", SHIFTS, "Shift that makes negatives; none: no negatives.")
    flags.DEFINE_enum(
        "source",
        None,
        ["in_distribution", "auxiliary", "both"],
        "What is shifted; default: auxiliary where --auxiliary is given, else in_distribution.",
    )
    flags.DEFINE_integer("local_views", 8, "Local views of each image.", 0)
    flags.DEFINE_integer("local_size", None, "Their side; default: half of --image_size.", 1)
    flags.DEFINE_list("global_area", ["0.4", "1"], "Smallest, largest share in a global view.")
    flags.DEFINE_list("local_area", ["0.05", "0.4"], "The same for a local view.")
    flags.DEFINE_list("aspect_ratio", ["0.75", "1.33333"], "Smallest, largest width / height.")
    flags.DEFINE_float("flip", 0.5, "Probability of a horizontal flip.", 0.0, 1.0)
    flags.DEFINE_float("color_jitter", 0.8, "Probability of the colour jitter.", 0.0, 1.0)
    flags.DEFINE_float("brightness", 0.4, "Largest relative change of the brightness.", 0.0)
    flags.DEFINE_float("contrast", 0.4, "Largest relative change of the contrast.", 0.0)
    flags.DEFINE_float("saturation", 0.2, "Largest relative change of the saturation.", 0.0)
    flags.DEFINE_float("hue", 0.1, "Largest hue shift, in turns of the colour circle.", 0.0, 0.5)
    flags.DEFINE_float("grayscale", 0.2, "Probability of a grey view.", 0.0, 1.0)
    flags.DEFINE_list("blur", ["1", "0.1", "0.5"], "Probability: first, second global, local.")
    flags.DEFINE_list("blur_sigma", ["0.1", "2"], "Smallest, largest, in pixels of a 224 px view.")
    flags.DEFINE_list("solarize", ["0", "0.2", "0"], "Probability: first, second global, local.")


def _define_loss_flags():
    flags.DEFINE_float("student_temperature", 0.1, "Temperature of the student.", 1e-6)
    flags.DEFINE_list("teacher_temperature", ["0.04"], "Value, or START,END, linear over the run.")
    flags.DEFINE_list("teacher_momentum", ["0.996", "1"], "START,END, half a cosine over the run.")
    flags.DEFINE_float("center_momentum", 0.9, "Share of the centre that stays.", 0.0, 1.0)
    flags.DEFINE_float("negative_weight", 1.0, "Weight lambda of the negative term.", 0.0)
    flags.DEFINE_list(
        "negative_ramp_epochs", ["0", "0"], "START,END between which that weight grows from 0."
    )


def _define_optimizer_flags():
    flags.DEFINE_integer("batch_size", 64, "Images in a step, over all devices.", 1)
    flags.DEFINE_integer("epochs", 100, "Epochs.", 1)
    flags.DEFINE_integer(
        "steps_per_epoch", None, "Steps of an epoch; default: once through the images.", 1
    )
    flags.DEFINE_float("learning_rate", 0.004, "For 256 images in a step; else in proportion.", 0.0)
    flags.DEFINE_float("final_learning_rate", 1e-6, "At the end, after half a cosine.", 0.0)
    flags.DEFINE_float("warmup_epochs", 0.0, "Epochs of the linear warm-up.", 0.0)
    flags.DEFINE_list("weight_decay", ["0.04", "0.4"], "START,END, half a cosine over the run.")
    flags.DEFINE_float("gradient_clip_norm", 3.0, "Largest norm of a tensor's gradient.", 1e-6)
    flags.DEFINE_float("frozen_last_layer_epochs", 0.0, "Epochs with the last layer fixed.", 0.0)


# --- Settings ----------------------------------------------------------------------------------


def apply_recipe(name):
    """Give the flags that the command line leaves open the values of a recipe."""
    path = RECIPES / f"{name.replace('-', '_')}.py"
    path = path if path.is_file() else pathlib.Path(name).expanduser()
    if not (path.is_file() and path.suffix == ".py"):
        known = sorted(one.stem for one in RECIPES.glob("*.py"))
        raise ValueError(f"--recipe must be one of {known} or a Python file. Received: {name}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for flag, value in module.RECIPE.items():
        if flag not in OWN_FLAGS:
            raise ValueError(f"--recipe: {path} sets a flag that there is not: {flag}")
        FLAGS.set_default(flag, [str(v) for v in value] if isinstance(value, list) else value)


def settings_of_flags():
    """The flags' values after the recipe, checked, lists of numbers as tuples of floats."""
    if FLAGS.recipe:
        apply_recipe(FLAGS.recipe)
    values = {name: FLAGS[name].value for name in sorted(OWN_FLAGS)}
    settings = types.SimpleNamespace(**values)
    for name in ("data", "output_dir"):
        if not values[name]:
            raise ValueError(f"--{name} is needed. Received: --{name}={values[name]}")
    for name in ("global_area", "local_area", "aspect_ratio", "blur_sigma", "weight_decay"):
        setattr(settings, name, command_line.numbers(name, values[name], 2))
    for name in ("teacher_temperature", "teacher_momentum", "negative_ramp_epochs"):
        setattr(settings, name, command_line.numbers(name, values[name], 2))
    for name in ("blur", "solarize", "mean", "std"):
        setattr(settings, name, command_line.numbers(name, values[name], 3))
    settings.resolution = command_line.size("resolution", values["resolution"])
    settings.source = settings.source or ("auxiliary" if settings.auxiliary else "in_distribution")
    return settings


def check(settings):
    """What no flag can check alone."""
    if settings.backbone not in BACKBONES and not settings.backbone.endswith(".keras"):
        raise ValueError(
            f"--backbone must be one of {', '.join(BACKBONES)} or a .keras file. "
            f"Received: {settings.backbone}"
        )
    if settings.weights and not settings.weights.endswith(".weights.h5"):
        raise ValueError(f"--weights must be a .weights.h5 file. Received: {settings.weights}")
    if needs_auxiliary(settings) and not settings.auxiliary:
        raise ValueError(f"--source={settings.source} needs --auxiliary. Received: none")
    if not settings.in_memory and not settings.calibration:
        raise ValueError("--noin_memory needs --calibration. Received: none")
    for name in ("data", "auxiliary", "calibration"):
        if getattr(settings, name):
            command_line.source(name, getattr(settings, name), "train")


def needs_auxiliary(settings):
    """Whether negatives are made of auxiliary images."""
    return settings.shift != "none" and settings.source != "in_distribution"


# --- Images ------------------------------------------------------------------------------------


def read_images(settings):
    """Training images in memory (or None), calibration images, and their resolution."""
    import numpy as np

    one = command_line.source("data", settings.data, "train")
    resolution = settings.resolution
    if resolution is None and one.location.startswith("folder:") and settings.image_size:
        resolution = (settings.image_size, settings.image_size)
    images = None
    if settings.in_memory:
        images = command_line.read("data", one, settings, resolution, limit=settings.limit)
        resolution = images.shape[1:3]
    if settings.calibration:
        held_out = command_line.source("calibration", settings.calibration, "test")
        calibration = command_line.read("calibration", held_out, settings, resolution)
        return images, calibration, tuple(calibration.shape[1:3])
    order = np.random.default_rng(settings.seed).permutation(len(images))
    count = math.ceil(settings.calibration_share * len(images))
    needed = math.ceil(1 / settings.false_positive_rate - 1e-6) - 1
    if count < needed or count >= len(images):
        raise ValueError(
            f"--calibration_share={settings.calibration_share} of {len(images)} images is {count}; "
            f"--false_positive_rate={settings.false_positive_rate} needs at least {needed}."
        )
    return images[np.sort(order[count:])], images[np.sort(order[:count])], tuple(resolution)


def training_batches(settings, images, resolution, first_batch=None):
    """Shuffled batches of images, with auxiliary images where negatives need them.

    With `first_batch` they have no end, and begin with that one.
    """
    import sddns_tf

    options = {"batch_size": settings.batch_size, "shuffle": True, "first_batch": first_batch}
    of_images = {**options, "drop_remainder": True}
    if images is None:
        one = command_line.source("data", settings.data, "train")
        images, reading = command_line.opened(one, settings, resolution)
        of_images.update(reading)
    batches = sddns_tf.data.load(images, seed=settings.seed, **of_images)
    if not needs_auxiliary(settings):
        return batches
    one = command_line.source("auxiliary", settings.auxiliary, "train")
    excluded = {}
    if settings.auxiliary_exclude:
        excluded["exclude_labels"] = class_names(settings.auxiliary_exclude)
    if settings.in_memory:
        auxiliary = command_line.read("auxiliary", one, settings, resolution, **excluded)
    else:
        auxiliary, reading = command_line.opened(one, settings, resolution)
        options = {**options, **reading, **excluded}
    auxiliary = sddns_tf.data.load(auxiliary, seed=settings.seed + 1, **options)
    return sddns_tf.data.with_auxiliary(batches, auxiliary)


def class_names(path):
    """The first word of each line that is not empty and no comment."""
    lines = pathlib.Path(path).expanduser().read_text().splitlines()
    return [line.split()[0] for line in lines if line.strip() and line[0] != "#"]


# --- Model -------------------------------------------------------------------------------------


def make_strategy(settings):
    """The distribution strategy, or None for one device."""
    import tensorflow as tf

    if settings.strategy == "multi_worker":
        if "TF_CONFIG" not in os.environ:
            raise ValueError(
                "--strategy=multi_worker needs the environment variable TF_CONFIG. Received: none"
            )
        return several_replicas(tf.distribute.MultiWorkerMirroredStrategy())
    several = len(tf.config.list_physical_devices("GPU")) > 1
    if settings.strategy == "mirrored" or (settings.strategy == "auto" and several):
        return several_replicas(tf.distribute.MirroredStrategy())
    return None


def several_replicas(strategy):
    """The strategy, or None where it has one replica and nothing is to be distributed."""
    if strategy.num_replicas_in_sync == 1:
        command_line.say("One device only: training without a strategy")
        return None
    return strategy


def worker_index(settings):
    """Which of several machines this is; the first one writes the results."""
    if settings.strategy != "multi_worker":
        return 0
    return json.loads(os.environ["TF_CONFIG"]).get("task", {}).get("index", 0)


def make_backbone(settings, image_size):
    """The network to start from."""
    import sddns_tf

    if settings.backbone not in BACKBONES:
        backbone = command_line.load_keras("backbone", settings.backbone)
        return getattr(backbone, "teacher_backbone", backbone)
    sizes = ("hidden_dim", "depth", "num_heads")
    options = {name: getattr(settings, name) for name in sizes if getattr(settings, name)}
    backbone = getattr(sddns_tf, settings.backbone)(
        image_size=image_size,
        patch_size=settings.patch_size,
        drop_path_rate=settings.drop_path_rate,
        recompute=settings.recompute,
        **options,
    )
    if settings.weights:
        backbone.load_weights(os.path.expanduser(settings.weights))
    return backbone


def make_model(settings, image_size, steps_per_epoch):
    """The compiled `SelfDistillation`."""
    import keras

    import sddns_tf
    from sddns_tf import schedules

    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision)
    steps = settings.epochs * steps_per_epoch
    view_names = (
        "local_views", "local_size", "global_area", "local_area", "aspect_ratio", "flip",
        "color_jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur",
        "blur_sigma", "solarize",
    )  # fmt: skip
    negatives = None
    if settings.shift != "none":
        negatives = sddns_tf.Negatives(settings.shift, settings.source)
    ramp = [int(epochs * steps_per_epoch) for epochs in settings.negative_ramp_epochs]
    model = sddns_tf.SelfDistillation(
        backbone=make_backbone(settings, image_size),
        views=sddns_tf.MultiCrop(image_size, **{n: getattr(settings, n) for n in view_names}),
        negatives=negatives,
        head=sddns_tf.ProjectionHead(
            settings.num_prototypes,
            hidden_dim=settings.head_hidden_dim,
            bottleneck_dim=settings.bottleneck_dim,
            num_layers=settings.head_layers,
            norm_last_layer=settings.norm_last_layer,
        ),
        student_temperature=settings.student_temperature,
        teacher_temperature=schedules.Linear(*settings.teacher_temperature, end_step=steps),
        teacher_momentum=schedules.WarmupCosine(*settings.teacher_momentum, steps),
        center_momentum=settings.center_momentum,
        negative_weight=schedules.Linear(0.0, settings.negative_weight, ramp[1], ramp[0])
        if ramp[1]
        else settings.negative_weight,
        weight_decay=schedules.WarmupCosine(*settings.weight_decay, steps),
        gradient_clip_norm=settings.gradient_clip_norm,
        frozen_last_layer_steps=int(settings.frozen_last_layer_epochs * steps_per_epoch),
        mean=settings.mean,
        std=settings.std,
        seed=settings.seed,
    )
    learning_rate = schedules.WarmupCosine(
        settings.learning_rate * settings.batch_size / 256,
        settings.final_learning_rate,
        steps,
        warmup_steps=min(int(settings.warmup_epochs * steps_per_epoch), steps),
    )
    model.compile(keras.optimizers.Adam(learning_rate))
    return model


# --- The run -----------------------------------------------------------------------------------


def check_same_run(settings):
    """Refuse to go on with a run that was begun with other settings."""
    path = pathlib.Path(settings.output_dir) / "config.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())["flags"]
    for name, value in json.loads(json.dumps(vars(settings))).items():
        if name not in NOT_OF_THE_RUN and before.get(name) != value:
            raise ValueError(
                f"--output_dir={settings.output_dir} holds a run with --{name}={before.get(name)}. "
                f"Received: --{name}={value}. Choose another folder, or --noresume to start anew."
            )


def forget_run(output_dir):
    """Remove what a run would go on from."""
    for name in ("checkpoint", "tensorboard"):
        shutil.rmtree(pathlib.Path(output_dir) / name, ignore_errors=True)
    for name in ("config.json", "log.csv"):
        (pathlib.Path(output_dir) / name).unlink(missing_ok=True)


def callbacks(settings, checkpoint, batches, images, calibration):
    """What watches, logs and keeps the training."""
    import keras

    import sddns_tf

    output_dir = pathlib.Path(settings.output_dir)
    found = [
        sddns_tf.callbacks.CollapseMonitor(),
        sddns_tf.callbacks.NotFinite(checkpoint, settings.rollbacks),
        checkpoint,
    ]
    if importlib.util.find_spec("tensorboard"):
        from sddns_tf.callbacks.pictures import TrainingPictures

        folder = str(output_dir / "tensorboard")
        sample = calibration if images is None else images
        batch = next(iter(batches.take(1)))
        auxiliary = batch["auxiliary"] if needs_auxiliary(settings) else None
        found += [
            TrainingPictures(
                folder, sample[:1000], calibration[:500], auxiliary, settings.pictures_every
            ),
            keras.callbacks.TensorBoard(folder, write_graph=False),
        ]
    return [*found, keras.callbacks.CSVLogger(output_dir / "log.csv", append=True)]


def train(settings):
    """Train, or go on training, and write everything.

    Args:
        settings: From `settings_of_flags`.

    Returns:
        The `Detector`, and the images that calibrated it.
    """
    import contextlib

    import keras

    import sddns_tf

    strategy = make_strategy(settings)
    checkpoint_dir = pathlib.Path(settings.output_dir) / "checkpoint"  # of all machines
    if index := worker_index(settings):
        settings.output_dir = os.path.join(settings.output_dir, f"worker-{index}")
    pathlib.Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    if not settings.resume:
        forget_run(settings.output_dir)
    check_same_run(settings)
    images, calibration, resolution = read_images(settings)
    batches = training_batches(settings, images, resolution)
    image_size = settings.image_size or round(math.sqrt(math.prod(resolution)))
    steps_per_epoch = settings.steps_per_epoch or int(batches.cardinality())
    if steps_per_epoch < 1:
        raise ValueError("--steps_per_epoch is needed: the number of images is not known.")
    derived = {
        "resolution": resolution,
        "image_size": image_size,
        "steps_per_epoch": steps_per_epoch,
        "training_images": None if images is None else len(images),
        "calibration_images": len(calibration),
        "keras": keras.__version__,
    }
    config = {"flags": vars(settings), "derived": derived}
    command_line.write_json(pathlib.Path(settings.output_dir) / "config.json", config)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make_model(settings, image_size, steps_per_epoch)
    checkpoint = sddns_tf.callbacks.Checkpoint(checkpoint_dir, settings.checkpoint_every)
    step = checkpoint.restore(model)
    command_line.say(
        f"Training {settings.epochs} epochs of {steps_per_epoch} steps, from step {step}"
    )
    watching = callbacks(settings, checkpoint, batches, images, calibration)
    for first_batch, part in sddns_tf.checkpoint.parts_left(step, steps_per_epoch, settings.epochs):
        model.fit(
            training_batches(settings, images, resolution, first_batch),
            callbacks=watching,
            verbose=command_line.progress() or 2,
            **part,
        )
    return write_results(settings, model, images, calibration, resolution), calibration


def write_results(settings, model, images, calibration, resolution):
    """The model, its backbone and the detector; the detector is returned."""
    import sddns_tf

    bank = images
    if images is None:
        one = command_line.source("data", settings.data, "train")
        location, reading = command_line.opened(one, settings, resolution)
        bank = sddns_tf.data.load(location, batch_size=settings.batch_size, **reading)
    detector = sddns_tf.Detector.from_images(
        model.teacher_backbone,
        bank_images=bank,
        calibration_images=calibration,
        false_positive_rate=settings.false_positive_rate,
        image_size=detector_size(model, resolution),
        resolution=resolution,
        mean=settings.mean,
        std=settings.std,
        temperature=settings.score_temperature,
        offset=settings.score_offset,
        k=settings.neighbors,
        bank_size=settings.bank_size,
        seed=settings.seed,
        verbose=command_line.progress(),
    )
    output_dir = pathlib.Path(settings.output_dir)
    for name, value in (
        ("model", model), ("backbone", model.teacher_backbone), ("detector", detector)
    ):  # fmt: skip
        command_line.save_keras(value, output_dir / f"{name}.keras")
    return detector


def detector_size(model, resolution):
    """Input size of the detector: the views' area, in the proportions of the images."""
    side = model.views.image_size
    if resolution[0] == resolution[1]:
        return side, side
    unit = getattr(model.teacher_backbone, "patch_size", 1)
    scale = side / math.sqrt(math.prod(resolution))
    return tuple(max(unit, round(scale * length / unit) * unit) for length in resolution)


def main():
    """Train what the flags describe."""
    settings = settings_of_flags()
    check(settings)
    detector, _ = train(settings)
    if worker_index(settings):
        return
    print(
        f"{pathlib.Path(settings.output_dir).resolve()}: detector.keras, backbone.keras, "
        f"model.keras. Threshold of the OOD score {detector.threshold:.6g}, for at most "
        f"{detector.false_positive_rate:.2%} of normal images."
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
