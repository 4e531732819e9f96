"""A training run: from a resolved configuration to a calibrated detector on disk."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import pathlib
from typing import Any, NamedTuple

from sddns_tf import files
from sddns_tf.cli import advice, configuration, detectors, devices, earlier, images, sources
from sddns_tf.cli.configuration import DataOptions
from sddns_tf.cli.console import say, verbose
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.schedule_forms import Length, value_of
from sddns_tf.cli.scorers import load_keras

# Of a run whose number of epochs is not given.
_STEPS, _MOST_EPOCHS = 2_000, 100


class Place(NamedTuple):
    """Where and how a run takes place. None of this changes the results.

    Attributes:
        output_dir: Folder to write to.
        data_dir: Folder of prepared TFDS data sets, or None.
        resume: Whether to continue a run in `output_dir`.
        strategy: One of `devices.STRATEGIES`.
        logical_devices: Number of devices into which to divide the CPU, or None.
        checkpoint_every: Steps between two checkpoints.
        rollbacks: How many times to return to a checkpoint if a number is not finite.
        pictures_every: Epochs between pictures in TensorBoard.
    """

    output_dir: str
    data_dir: str | None = None
    resume: bool = True
    strategy: str = "auto"
    logical_devices: int | None = None
    checkpoint_every: int = 500
    rollbacks: int = 0
    pictures_every: int = 5


def train(config: dict[str, Any], place: Place) -> tuple[Any, images.Images]:
    """Train, or continue training, and write all results.

    Args:
        config: Resolved configuration: see `configuration.resolve`.
        place: `Place`.

    Returns:
        The `Detector` and the `Images`; the detector is None on all machines but the first.

    Raises:
        UsageError: If the user can fix what is wrong.
    """
    strategy = devices.strategy(place.strategy, place.logical_devices)
    data_options = check(config)
    index = devices.worker_index(place.strategy)
    folder = pathlib.Path(place.output_dir).expanduser()
    output_dir = folder / f"worker-{index}" if index else folder
    with user_input("output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
    with earlier.alone(output_dir):
        model, found = _train(config, place, data_options, strategy, output_dir)
        if index:
            return None, found
        bank = images.bank(config, data_options, place.data_dir, found)
        return detectors.write(config, model, bank, found, output_dir), found


def _train(
    config: dict[str, Any],
    place: Place,
    data_options: DataOptions,
    strategy: Any,
    output_dir: pathlib.Path,
) -> tuple[Any, images.Images]:
    """Train, or continue training, and return the model and the `Images`."""
    import sddns_tf
    from sddns_tf import calibration
    from sddns_tf.callbacks import training_state
    from sddns_tf.cli.progress import Progress

    if place.resume:
        earlier.check_same_run(config, output_dir)
    found = images.read(config, data_options, place.data_dir)
    if place.resume:
        earlier.check_same_images(found, output_dir)
    given, config = config, {**config, "batch_size": images.batch_size(config, found.training)}
    one_epoch = images.batches(config, data_options, place.data_dir, found)
    length = length_of(config, one_epoch)
    with user_input():
        rate = config["detector"]["false_positive_rate"]
        calibration.largest_flagged_rank(len(found.calibration), rate)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make_model(config, found.resolution, length)
    detectors.check_layers(config, model, found.resolution)
    with user_input("output_dir", OSError):
        if not place.resume:
            earlier.forget(output_dir)
        _write_config(given, output_dir, found, length)
    shared = pathlib.Path(place.output_dir).expanduser()  # by all machines
    checkpoint = sddns_tf.callbacks.Checkpoint(shared / "checkpoint", place.checkpoint_every)
    with user_input():
        # Without `resume` the first machine removes the states, perhaps after this one looks.
        step = checkpoint.restore(model) if place.resume else 0
    earlier.cut_log(output_dir / "log.csv", step // length.steps_per_epoch)
    say(
        f"Training {model.student_backbone.name} on {images.number_of(found.training)} images: "
        f"{length.epochs} epochs of {length.steps_per_epoch} steps, from step {step}"
    )
    watching = callbacks(config, place, output_dir, checkpoint, one_epoch, found)
    about = functools.partial(advice.lines, model, config, length)
    watching.append(Progress(length.steps, step, about, once=bool(verbose())))
    for first_batch, part in training_state.parts_left(step, length.steps_per_epoch, length.epochs):
        batches = images.batches(config, data_options, place.data_dir, found, first_batch)
        with user_input(kinds=OSError):  # such as a full disk
            model.fit(batches, callbacks=watching, verbose=verbose(), shuffle=False, **part)
    return model, found


def check(config: dict[str, Any]) -> DataOptions:
    """Check a configuration before anything slow.

    Args:
        config: Resolved configuration.

    Returns:
        Its `DataOptions`.

    Raises:
        UsageError: If something is missing or does not fit together.
    """
    from sddns_tf import validation

    data_options = DataOptions(**config["data"])
    if not data_options.source:
        raise UsageError("--data is needed. Received: none")
    with user_input():
        for name in ("batch_size", "epochs"):
            if config[name] is not None:
                validation.check_int(name, config[name])
        validation.check_int("seed", config["seed"], low=0, high=2**31 - 1)
        validation.check_choice("resize", data_options.resize, ("squash", "crop"))
        if data_options.calibration_share is not None:
            validation.check_number("calibration_share", data_options.calibration_share, 0.0, 0.9)
        _check_arguments(config)
    for name in ("source", "auxiliary", "calibration"):
        text = getattr(data_options, name)
        if not isinstance(text, str | None):
            raise UsageError(f"data.{name} must be a string. Received: {text!r}")
        if text:
            sources.parse("data" if name == "source" else name, text, "train")
    if images.needs_auxiliary(config) and not data_options.auxiliary:
        raise UsageError(
            f"negatives.source={config['negatives']['source']} needs --auxiliary. Received: none"
        )
    if images.compares_auxiliary(config) and not data_options.auxiliary:
        weight = config["detector"]["auxiliary_weight"]
        raise UsageError(f"detector.auxiliary_weight={weight} needs --auxiliary. Received: none")
    if not data_options.in_memory and not data_options.calibration:
        raise UsageError("--noin_memory needs --calibration. Received: none")
    if not data_options.in_memory and data_options.limit:
        raise UsageError(f"--limit needs images in memory. Received: {data_options.limit}")
    return data_options


def _check_arguments(config: dict[str, Any]) -> None:
    """Construct everything cheap now, so that wrong arguments fail before images are read."""
    import sddns_tf

    image_size = config["views"]["image_size"] or 32
    sddns_tf.MultiCrop(**{**config["views"], "image_size": image_size})
    sddns_tf.ProjectionHead(**config["head"])
    make_negatives(config)
    detectors.check(config)
    length = Length(config["epochs"] or 1, 1, images.batch_size(config, None))
    for section in ("model", "optimizer"):
        for key, form in config[section].items():
            value_of(f"{section}.{key}", form, length)


# --- The model ---------------------------------------------------------------------------------


def make_negatives(config: dict[str, Any]) -> Any:
    """Return the `Negatives` of a configuration, or None."""
    import sddns_tf

    options = config["negatives"]
    return None if options is None else sddns_tf.Negatives(**options)


def make_backbone(config: dict[str, Any], image_size: int) -> Any:
    """Return the backbone to train."""
    options = dict(config["backbone"])
    name = options.pop("type")
    if name.endswith(".keras"):
        backbone = load_keras("backbone", name)
        backbone = getattr(backbone, "teacher_backbone", backbone)
        if not backbone.trainable_weights:  # as a teacher is saved
            backbone.trainable = False  # Keras does nothing for what it takes to be so already.
            backbone.trainable = True
        return backbone
    weights = options.pop("weights")
    options = {key: value for key, value in options.items() if value is not None}
    if name != "convnet":
        options["image_size"] = image_size
    backbone = configuration.constructor("backbone", name)(**options)
    if weights:
        with user_input("backbone.weights"):
            backbone.load_weights(pathlib.Path(weights).expanduser())
    return backbone


def make_optimizer(config: dict[str, Any], length: Length) -> Any:
    """Return the Keras optimizer of a configuration."""
    options = dict(config["optimizer"])
    name = options.pop("type")
    options = {key: value_of(f"optimizer.{key}", form, length) for key, form in options.items()}
    return configuration.constructor("optimizer", name)(**options)


def make_model(config: dict[str, Any], resolution: tuple[int, int], length: Length) -> Any:
    """Return the compiled `SelfDistillation`.

    Args:
        config: Resolved configuration.
        resolution: Height and width of the images.
        length: `Length` of the run.

    Returns:
        `SelfDistillation`.

    Raises:
        UsageError: If a constructor rejects its arguments.
    """
    import keras

    import sddns_tf

    keras.utils.set_random_seed(config["seed"])
    options = {key: value_of(f"model.{key}", form, length) for key, form in config["model"].items()}
    with user_input():
        keras.config.set_dtype_policy(config["precision"])
        image_size = config["views"]["image_size"] or round(math.sqrt(math.prod(resolution)))
        model = sddns_tf.SelfDistillation(
            backbone=make_backbone(config, image_size),
            views=sddns_tf.MultiCrop(**{**config["views"], "image_size": image_size}),
            negatives=make_negatives(config),
            head=sddns_tf.ProjectionHead(**config["head"]),
            seed=config["seed"],
            **options,
        )
        model.compile(make_optimizer(config, length))
    return model


# --- The run -----------------------------------------------------------------------------------


def length_of(config: dict[str, Any], one_epoch: Any) -> Length:
    """Return the length of a run.

    Args:
        config: Resolved configuration.
        one_epoch: `tf.data.Dataset` of the batches of one pass through the images.
    """
    steps = config["steps_per_epoch"] or int(one_epoch.cardinality())
    if steps < 1:
        raise UsageError(
            "--steps_per_epoch is needed where the number of images is unknown. Received: none"
        )
    # Few images are seen more often than many.
    epochs = config["epochs"] or min(max(round(_STEPS / steps), 1), _MOST_EPOCHS)
    return Length(epochs, steps, config["batch_size"])


def _write_config(
    config: dict[str, Any], output_dir: pathlib.Path, found: images.Images, length: Length
) -> None:
    import keras

    from sddns_tf.version import __version__

    derived = {
        "resolution": found.resolution,
        "epochs": length.epochs,
        "steps_per_epoch": length.steps_per_epoch,
        "batch_size": length.batch_size,
        "training_images": None if found.training is None else len(found.training),
        "training_fingerprint": images.fingerprint(found.training),
        "calibration_images": len(found.calibration),
        "sddns_tf": __version__,
        "keras": keras.__version__,
    }
    files.write_json(output_dir / "config.json", {**config, "derived": derived})


def callbacks(
    config: dict[str, Any],
    place: Place,
    output_dir: pathlib.Path,
    checkpoint: Any,
    one_epoch: Any,
    found: images.Images,
) -> list[Any]:
    """Return the Keras callbacks that monitor, log and checkpoint the training."""
    import keras

    import sddns_tf

    watching = [
        sddns_tf.callbacks.NotFinite(checkpoint, place.rollbacks),
        sddns_tf.callbacks.CollapseMonitor(),
        checkpoint,
    ]
    if importlib.util.find_spec("tensorboard") and importlib.util.find_spec("matplotlib"):
        from sddns_tf.callbacks.pictures import TrainingPictures

        folder = str(output_dir / "tensorboard")
        sample = found.calibration if found.training is None else found.training
        auxiliary = found.auxiliary
        if auxiliary is None and images.needs_auxiliary(config):
            auxiliary = next(iter(one_epoch.take(1)))["auxiliary"]
        watching += [
            TrainingPictures(
                folder,
                sample[:1000],
                found.calibration[:500],
                None if auxiliary is None else auxiliary[:8],
                place.pictures_every,
            ),
            keras.callbacks.TensorBoard(folder, write_graph=False),
        ]
    return [*watching, keras.callbacks.CSVLogger(output_dir / "log.csv", append=True)]
