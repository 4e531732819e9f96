"""Training states on disk, written completely or not at all, to resume an interrupted run."""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from sddns_tf import files
from sddns_tf.keras_private import inner, learning_rate_of
from sddns_tf.networks import use_new_weights

_FACTOR = "learning_rate_factor"


@keras.saving.register_keras_serializable("sddns_tf")
class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate schedule times a constant.

    Args:
        schedule: `LearningRateSchedule`.
        factor: Float.

    Example:
        >>> optimizer.learning_rate = ScaledSchedule(optimizer.learning_rate_schedule, 0.5)
    """

    def __init__(self, schedule: Any, factor: float) -> None:
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step: int) -> tf.Tensor:
        """Return the learning rate at a step."""
        return self.factor * self.schedule(step)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        serialize = keras.saving.serialize_keras_object
        return {"schedule": serialize(self.schedule), "factor": self.factor}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the schedule that `get_config` describes."""
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["factor"])


def save(model: keras.Model, folder: str | os.PathLike, keep: int = 2) -> pathlib.Path:
    """Write the whole training state of a compiled model: `FOLDER/step-<step>.npz`.

    It holds the weights, teacher, center, step, optimizer and states of random layers, but not the
    running means of logged metrics. The file is written under another name, flushed to disk and
    then renamed, so a process killed at any moment leaves a complete file or none.

    Args:
        model: `SelfDistillation`, compiled.
        folder: Path; created if it does not exist. Only one process at a time may write to it.
        keep: Int, number of states to keep, the newest ones. States of later steps are not of this
            run, and stay.

    Returns:
        Path of the file.

    Raises:
        OSError: If the folder cannot be written to; the message names it.
    """
    folder = pathlib.Path(folder).expanduser()
    values: dict[str, Any] = {
        name: value_of(variable) for name, variable in _variables(model).items()
    }
    values[_FACTOR] = np.float64(_factor(model))
    path = folder / f"step-{step_of(model):08d}.npz"
    try:
        with files.replacing(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, **values)
    except OSError as error:
        raise OSError(f"The training state cannot be written to {folder}: {error}") from error
    until_now = [other for other in saved(folder) if other.name <= path.name]
    # Hidden files are unfinished ones, left by a process that was killed.
    for old in [*until_now[:-keep], *folder.glob(".*.step-*.npz")]:
        old.unlink(missing_ok=True)
    return path


def step_of(model: keras.Model) -> int:
    """Return the number of steps that a model has done, on any number of devices: an int."""
    return int(value_of(model.step))


def value_of(variable: Any) -> np.ndarray:
    """Return the value of a Keras variable as an array.

    For a variable on several devices, the value on the first.
    """
    return np.asarray(tf.convert_to_tensor(variable.value))


def restore(model: keras.Model, folder: str | os.PathLike) -> pathlib.Path | None:
    """Load the newest complete training state of a folder into a model.

    Args:
        model: `SelfDistillation`, compiled like the one that was saved.
        folder: As for `save`.

    Returns:
        Path of the file, or `None` if there is none. Files that cannot be read are skipped with a
        warning.

    Raises:
        ValueError: If the state belongs to another model.
    """
    for path in reversed(saved(folder)):
        try:
            with np.load(path, allow_pickle=False) as file:
                values = dict(file)  # reads all: each array has a checksum
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            logging.warning("Skipped %s, which cannot be read: %s", path, error)
            continue
        _assign(model, values, path)
        return path
    return None


def saved(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Return the paths of a folder's training states, oldest first."""
    return sorted(pathlib.Path(folder).expanduser().glob("step-*.npz"))


def parts_left(step: int, steps_per_epoch: int, epochs: int) -> list[tuple[int, dict[str, int]]]:
    """Return what is left of a training run: the rest of an interrupted epoch, then whole ones.

    Args:
        step: Int; steps done.
        steps_per_epoch: Int.
        epochs: Int; epochs of the whole run.

    Returns:
        List of up to two pairs: the number of the first batch, and the arguments `initial_epoch`,
        `epochs` and `steps_per_epoch` of `fit`.

    Example:
        >>> checkpoint = sddns_tf.callbacks.Checkpoint("run/checkpoint")
        >>> for first, part in parts_left(checkpoint.restore(model), 500, epochs=100):
        ...     batches = data.load(images, batch_size=64, shuffle=True, first_batch=first)
        ...     model.fit(batches, callbacks=[checkpoint], **part)
    """
    epoch, done = divmod(step, steps_per_epoch)
    parts = []
    if done and epoch < epochs:
        rest = {"initial_epoch": epoch, "epochs": epoch + 1}
        parts.append((step, {**rest, "steps_per_epoch": steps_per_epoch - done}))
        epoch += 1
    if epoch < epochs:
        whole = {"initial_epoch": epoch, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
        parts.append((epoch * steps_per_epoch, whole))
    return parts


def scale_learning_rate(model: keras.Model, factor: float) -> None:
    """Multiply the learning rate of a compiled model, whether a number or a schedule."""
    optimizer = inner(model.optimizer)
    schedule = learning_rate_of(optimizer)
    if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        schedule.assign(factor * schedule)
        return
    if isinstance(schedule, ScaledSchedule):
        schedule, factor = schedule.schedule, factor * schedule.factor
    optimizer.learning_rate = ScaledSchedule(schedule, factor)
    model.make_train_function(force=True)  # the schedule is part of the graph


def learning_rate_level(model: keras.Model) -> float:
    """Return what `scale_learning_rate` multiplies: a schedule's factor, or the rate itself."""
    rate = learning_rate_of(model.optimizer)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return _factor(model)
    if not isinstance(rate, keras.Variable):
        raise ValueError(
            "The learning rate must be a number or a keras.optimizers.schedules."
            f"LearningRateSchedule where it may have to be scaled. Received: {rate}"
        )
    return float(value_of(rate))


def _factor(model):
    schedule = learning_rate_of(model.optimizer)
    return schedule.factor if isinstance(schedule, ScaledSchedule) else 1.0


def _variables(model):
    """Return all variables of a training state, by names that are the same in each process.

    Paths are not, because Keras numbers the layers that a process has created.
    """
    if model.optimizer is None:
        raise ValueError(
            "The model must be compiled before its training state is saved or restored. "
            f"Received: {model.name}, which has no optimizer"
        )
    logged = {id(variable) for metric in model.metrics for variable in metric.variables}
    named = [(v.name, v) for v in model.variables if id(v) not in logged]
    named += [("optimizer", v) for v in model.optimizer.variables]
    return {f"{index:05d}_{name}": variable for index, (name, variable) in enumerate(named)}


def _assign(model, values, path):
    factor = float(values.pop(_FACTOR, 1.0))
    variables = _variables(model)
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    received = {name: value.shape for name, value in values.items()}
    if expected != received:
        wrong = sorted(dict(expected.items() ^ received.items()))[:3]
        raise ValueError(
            f"{path} must be the training state of a model and optimizer like this one. Received: "
            f"other variables, such as {', '.join(wrong)}"
        )
    for name, variable in variables.items():
        variable.assign(values[name])
    use_new_weights(model)
    if factor != _factor(model):
        scale_learning_rate(model, factor / _factor(model))
