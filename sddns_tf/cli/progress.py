"""Progress messages of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable

import keras

from sddns_tf.cli.console import say

_SECONDS_BETWEEN_LINES = 30.0
_FIRST_SECONDS = 5.0
_LONG_FIRST_STEP = 20.0


class Progress(keras.callbacks.Callback):
    """Callback that prints a line every half minute: step, seconds per step, time left.

    The first line comes after a few seconds, so that the duration of a run is known early, with
    what takes most of it. The first step, in which the graph is compiled, is not counted; where it
    alone takes long, it is reported, as an upper bound of the others.

    Args:
        total_steps: Steps of the whole run.
        steps_done: Steps done earlier, if the run is resumed.
        advice: Function from the seconds of a step to further lines after the first one.
        once: Whether there is a progress bar as well, so that only the first line is printed.
        clock: Function without arguments that returns seconds.
    """

    def __init__(
        self,
        total_steps: int,
        steps_done: int = 0,
        advice: Callable[[float], list[str]] = lambda seconds: [],
        once: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.advice = advice
        self.once = once
        self.total_steps = total_steps
        self.step = steps_done
        self._clock = clock
        self._first_step = 0
        self._began: float | None = None
        self._started: float | None = None
        self._last_line: float | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Note when the first step begins."""
        del logs
        if self._began is None:
            self._began = self._clock()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Count the step and print a line if one is due."""
        del batch
        self.step += 1
        now = self._clock()
        if self._started is None:
            self._started, self._first_step = now, self.step
            passed = 0.0 if self._began is None else now - self._began
            if passed >= _LONG_FIRST_STEP:
                step = f"Step {self.step:,} of {self.total_steps:,}"
                took = f"took {duration(passed)}, compilation included; the next ones are faster"
                say("\n" * self.once + f"{step} {took}")
            return
        if self.once and self._last_line is not None:
            return
        waits = _FIRST_SECONDS if self._last_line is None else _SECONDS_BETWEEN_LINES
        if now - (self._last_line or self._started) >= waits:
            self._tell(now, logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Print the first line if the epoch ended before it was due."""
        del epoch
        if self._started is None or self._last_line is not None or self.step <= self._first_step:
            return
        self._tell(self._clock(), logs or {})

    def _tell(self, now: float, logs: dict[str, float]) -> None:
        first, self._last_line = self._last_line is None, now
        assert self._started is not None
        seconds = (now - self._started) / (self.step - self._first_step)
        left = seconds * (self.total_steps - self.step)
        loss = f", loss {float(logs['loss']):.3f}" if "loss" in logs else ""
        say(
            "\n"
            * self.once  # not into the bar
            + f"Step {self.step:,} of {self.total_steps:,}: {seconds:.3g} s a step, "
            f"{duration(left)} left of {duration(seconds * self.total_steps)}{loss}"
        )
        for line in self.advice(seconds) if first else ():
            say(line)


def duration(seconds: float) -> str:
    """Return a duration in a readable unit, such as `"3.5 h"`.

    Args:
        seconds: Duration in seconds.

    Returns:
        String.
    """
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
