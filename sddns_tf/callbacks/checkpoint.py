"""`Checkpoint`: saves the training state to disk during a run."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import weakref
from typing import Any, Self

import keras
from absl import logging

from sddns_tf.callbacks import training_state
from sddns_tf.types import Array
from sddns_tf.validation import check_int

# Seconds after which a state is written, however few the steps.
_LONGEST = 600.0


@keras.saving.register_keras_serializable("sddns_tf")
class Checkpoint(keras.callbacks.Callback):
    """Saves the training state to disk, so a killed run resumes as if it had never stopped.

    A state is written before the first step (so a read-only folder or a disk without enough space
    fails right away), every `every` steps, after ten minutes, and at the end. On SIGTERM, such as
    before a machine is preempted, the state is written after the current step and the process exits
    with 0. On Ctrl-C it is written too, and `KeyboardInterrupt` is raised then; a second Ctrl-C
    does so at once. With several machines only the first one writes, but all must see the same
    folder.

    Args:
        folder: Path; created if it does not exist.
        every: Largest number of steps between two writes.
        keep: Number of states to keep, the newest ones.

    Raises:
        OSError: In `fit`, if the state cannot be written; the message names the folder.
        ValueError: In `fit`, if the folder has states of later steps than the model's and `restore`
            was not called: they are another run's, and would be restored instead of this one's.

    Example:
        >>> checkpoint = Checkpoint("run/checkpoint", every=500)
        >>> step = checkpoint.restore(model)  # 0 at the first start
        >>> batches = data.load(images, batch_size=64, shuffle=True, first_batch=step)
        >>> length = {"steps_per_epoch": 500, "epochs": 100, "initial_epoch": step // 500}
        >>> model.fit(batches, callbacks=[checkpoint], **length)

    To resume in the middle of an epoch, see `training_state.parts_left`.
    """

    def __init__(self, folder: str | os.PathLike, every: int = 500, keep: int = 2) -> None:
        super().__init__()
        check_int("every", every)
        check_int("keep", keep)
        self.folder = os.path.expanduser(folder)
        self.every = every
        self.keep = keep
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._restored: Any = lambda: None

    def restore(self, model: keras.Model) -> int:
        """Load the newest state into a compiled model.

        Args:
            model: `SelfDistillation`, built and compiled like the one that was saved.

        Returns:
            Int, the steps it has done; 0 if nothing was saved.
        """
        training_state.restore(model, self.folder)
        self._restored = weakref.ref(model)
        return training_state.step_of(model)

    def last(self) -> pathlib.Path | None:
        """Return the path of the newest state, or `None`."""
        return next(reversed(training_state.saved(self.folder)), None)

    def on_train_begin(self, logs: Any = None) -> None:
        """Write a first state, and listen for SIGTERM and Ctrl-C."""
        del logs
        self._check_alone()
        self._since = 0
        self._check_room(self.save())
        self._signal = None
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a job in the background
                numbers.remove(signal.SIGINT)
            for number in numbers:
                self._before[number] = signal.signal(number, self._on_signal)

    def on_train_batch_begin(self, batch: Array, logs: Any = None) -> None:
        """Remember the first step of this call, which may run several."""
        del logs
        self._begin = batch

    def on_train_batch_end(self, batch: Array, logs: Any = None) -> None:
        """Write a state if one is due."""
        del logs
        self._since += batch - self._begin + 1
        waited = time.monotonic() - self._saved
        if self._since >= self.every or waited >= _LONGEST or self._signal:
            self.save()
        self._stop_if_told()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save and exit if a signal came during the other callbacks."""
        del epoch, logs
        if self._signal:
            self.save()
        self._stop_if_told()

    def on_train_end(self, logs: Any = None) -> None:
        """Write the last state, and restore the signals' handlers."""
        del logs
        last = self.last()
        if last and last.stem > self._name_of_step():
            logging.warning(
                "The model went back to step %d when training ended, as EarlyStopping does with "
                "restore_best_weights. %s is that of the last step: save the model itself too.",
                training_state.step_of(self.model), last,
            )  # fmt: skip
        else:
            self.save()
        self.release()
        self._stop_if_told()

    def release(self) -> None:
        """Restore the signals' earlier handlers. `fit` calls this, whether it succeeds or fails."""
        if threading.current_thread() is threading.main_thread():
            while self._before:
                number, handler = self._before.popitem()
                signal.signal(number, handler or signal.SIG_DFL)

    def save(self) -> pathlib.Path | None:
        """Write the state now, and return its path; None on other machines than the first."""
        self._since, self._saved = 0, time.monotonic()
        if not _writes_here(self.model.distribute_strategy):
            return None
        return training_state.save(self.model, self.folder, self.keep)

    def _check_alone(self):
        if self._restored() is self.model or not _writes_here(self.model.distribute_strategy):
            return  # What was restored is the latest that can be read.
        step, last = training_state.step_of(self.model), self.last()
        if last and last.stem > self._name_of_step():
            raise ValueError(
                f"{self.folder} must have no states of later steps than the model's. Call "
                "`restore` to go on from the last one, or choose another folder. "
                f"Received: {last.name}, and a model that has done {step} steps"
            )

    def _name_of_step(self):
        return f"step-{training_state.step_of(self.model):08d}"

    def _check_room(self, written):
        if written is None:
            return
        needed = self.keep * written.stat().st_size
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} needs room for {self.keep + 1} training states, another "
                f"{needed / 2**20:.0f} MB. Received: {free / 2**20:.0f} MB free"
            )

    def _on_signal(self, number, frame):
        del frame
        if self._signal:  # a second signal, or `fit` has failed
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(1)
        self._signal = number
        if number == signal.SIGINT:
            logging.warning("Ctrl-C: stopping after this step. Once more stops at once, unsaved")

    def _stop_if_told(self):
        if not self._signal:
            return
        name = signal.Signals(self._signal).name
        step = training_state.step_of(self.model)
        logging.warning("%s: saved step %d in %s", name, step, self.folder)
        if self._signal == signal.SIGINT:
            self.release()
            raise KeyboardInterrupt
        sys.exit(0)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {"folder": self.folder, "every": self.every, "keep": self.keep}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the callback that `get_config` describes."""
        return cls(**config)


def _writes_here(strategy):
    resolver = getattr(strategy, "cluster_resolver", None)
    if not resolver or not resolver.task_type:
        return True
    first = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    return resolver.task_type == first and not resolver.task_id
